"""generate.py MODEL LOAD_FORMAT PROCESSES: greedy tokens of two prompts, by the whole of vLLM, each layer divided among
so many processes. bigsmall is not imported here: its entry point does it."""

from __future__ import annotations

import json
import sys

from vllm import LLM, SamplingParams

PROMPTS = [[1, 7, 300], [1, 9]]


def main() -> None:
    model, load_format, processes = sys.argv[1:]
    llm = LLM(
        model=model,
        load_format=load_format,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=2,
        kv_cache_memory_bytes=64 << 20,
        tensor_parallel_size=int(processes),
    )
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        SamplingParams(temperature=0, max_tokens=16, detokenize=False, ignore_eos=True),
    )
    print("RESULT", json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))


if __name__ == "__main__":  # vLLM's processes import this file again
    main()
