from __future__ import annotations

import re


def should_skip_weight(name: str, local_expert_ids: set[int] | None) -> bool:
    expert = re.search(r"\.experts\.(\d+)\.", name)
    if expert is None or local_expert_ids is None:
        return False
    return name.endswith(".weight") and int(expert[1]) not in local_expert_ids
