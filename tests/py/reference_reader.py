"""A second reader of `.bs` files, written from core/FORMAT.md and codecs/SPEC.md alone.

It shares no code with the product, and is plain rather than fast: where the two disagree, a text or a program is wrong.
Only what a GPU would do in parallel is done so here: the 32 lanes of a stream are one vector, and the word that a lane
takes is found by counting the lanes before it that take one.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, NoReturn

import numpy as np
import xxhash
import zstandard

Array = np.ndarray[Any, Any]

LANES = 32
BLOCK = 65536
GROUP = 4
CODECS = ("bs_stored", "bs_planes", "bs_lowcard", "bs_rowdelta", "bs_delta")
TRANSFORMS = ("plain", "half", "palette", "row_difference", "base_difference")
BLOCK_KINDS = ("stored", "coded", "zstd")
PLANE_KINDS = ("raw", "constant", "coded", "zstd")
PLAIN, HALF, PALETTE, ROW, BASE = range(5)

# torch's name: safetensors' name, bits of a value, bytes of a word, whether a word has a sign.
DTYPES: dict[str, tuple[str, int, int, bool]] = {
    "bool": ("BOOL", 8, 1, False),
    "uint8": ("U8", 8, 1, False),
    "int8": ("I8", 8, 1, False),
    "uint16": ("U16", 16, 2, False),
    "int16": ("I16", 16, 2, False),
    "uint32": ("U32", 32, 4, False),
    "int32": ("I32", 32, 4, False),
    "uint64": ("U64", 64, 8, False),
    "int64": ("I64", 64, 8, False),
    "float16": ("F16", 16, 2, True),
    "bfloat16": ("BF16", 16, 2, True),
    "float32": ("F32", 32, 4, True),
    "float64": ("F64", 64, 8, True),
    "complex64": ("C64", 64, 4, True),
    "float8_e4m3fn": ("F8_E4M3", 8, 1, True),
    "float8_e5m2": ("F8_E5M2", 8, 1, True),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 8, 1, True),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", 8, 1, True),
    "float8_e8m0fnu": ("F8_E8M0", 8, 1, False),
    "float4_e2m1fn_x2": ("F4", 4, 1, False),
    "float6_e2m3fn": ("F6_E2M3", 6, 1, False),
    "float6_e3m2fn": ("F6_E3M2", 6, 1, False),
}


class RefusedError(Exception):
    def __init__(self, status: str, why: str) -> None:
        super().__init__(f"{status}: {why}")
        self.status = status


def refuse(why: str, status: str = "corrupt") -> NoReturn:
    raise RefusedError(status, why)


def check(true: object, why: str, status: str = "corrupt") -> None:
    if not true:
        refuse(why, status)


def up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def xxh3(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


class Cursor:
    """Takes bytes off a buffer in order; whatever is left out must be zero."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        check(size <= len(self.data) - self.at, "cut short")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def array(self, count: int, dtype: str) -> Array:
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)

    def zeros(self, size: int) -> None:
        check(not any(self.take(size)), "bytes that are not zero")

    def align(self, multiple: int) -> None:
        self.zeros(-self.at % multiple)


def bits(data: bytes, count: int) -> Array:
    """The first bits, lowest first; those that pad the last byte must be zero."""
    found = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    check(not found[count:].any(), "bits that are not zero")
    return found[:count]


def zstd_frame(frame: bytes, size: int) -> bytes:
    """The content of exactly one frame. The announced size comes first: nothing larger may be allocated."""
    try:
        check(zstandard.frame_content_size(frame) in (-1, size), "size of a zstd frame")
        content = zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        refuse(f"zstd: {error}")
    check(len(content) == size, "size of a zstd frame")
    return content


def words_of(data: bytes, word_bytes: int) -> Array:
    return np.frombuffer(data, f"<u{word_bytes}").astype(np.uint64)


# ---- SPEC.md section 3: the coder ----


@dataclass
class Table:
    symbols: list[int]
    frequencies: list[int]


def read_table(cursor: Cursor, n_values: int) -> Table:
    count = cursor.number(1) + 1
    check(count >= 2, "a table of one symbol")
    # One integer is the string of bits. No table is longer than this: 256 times 23 + 4 + 11 bits.
    string = int.from_bytes(cursor.data[cursor.at : cursor.at + 1216], "little")
    used = 0

    def take(size: int) -> int:
        nonlocal used
        used += size
        return string >> used - size & (1 << size) - 1

    symbols, frequencies = [], []
    value = -1
    for _ in range(count):
        zeros = 0
        while not take(1):
            zeros += 1
            check(zeros <= 12, "a gamma code")
        value += 1 << zeros | take(zeros)
        check(value < n_values, "a value in a table")
        length = take(4)
        frequencies.append(1 << length | take(length))
        symbols.append(value)
    check(sum(frequencies) == 4096, "frequencies of a table")
    bits(cursor.take(-(-used // 8)), used)
    return Table(symbols, frequencies)


def buckets(frequencies: list[int]) -> int:
    return 64 if len(frequencies) <= 64 else 256


def alias_table(frequencies: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Threshold, alias and offset of the buckets."""
    count = buckets(frequencies)
    size = 4096 // count
    f = frequencies + [0] * (count - len(frequencies))
    threshold = [min(n, size) for n in f]
    alias = list(range(count))
    left = [n - t for n, t in zip(f, threshold)]
    room = [k for k in range(count) if threshold[k] < size]
    for k in room:  # grows while it is walked
        d = next(d for d in range(count) if left[d] > 0)
        need = size - threshold[k]
        alias[k] = d
        if need <= left[d]:
            left[d] -= need
        else:
            threshold[d] -= need - left[d]
            left[d] = 0
            room.append(d)
    used = list(threshold)
    offset = [0] * count
    for k in range(count):
        if threshold[k] < size:
            offset[k] = (used[alias[k]] - threshold[k]) % BLOCK
            used[alias[k]] += size - threshold[k]
    return threshold, alias, offset


class Tables:
    """Tables side by side, so that each lane may use its own."""

    def __init__(self, tables: list[Table]) -> None:
        count = len(tables)
        self.count = count
        self.symbol = np.zeros((count, 256), np.uint32)
        self.frequency = np.zeros((count, 256), np.uint32)
        self.threshold, self.alias, self.offset = np.zeros((3, count, 256), np.uint32)
        self.buckets = np.array([buckets(table.frequencies) for table in tables], np.uint32)
        for t, table in enumerate(tables):
            size, n = len(table.symbols), self.buckets[t]
            self.symbol[t, :size] = table.symbols
            self.frequency[t, :size] = table.frequencies
            self.threshold[t, :n], self.alias[t, :n], self.offset[t, :n] = alias_table(table.frequencies)

    def look_up(self, t: Any, slot: Array) -> tuple[Array, Array]:
        """The index of each lane's symbol in its table, and the rank of its slot. t: a table, or one for each lane."""
        bucket, r = slot % self.buckets[t], slot // self.buckets[t]
        own = r < self.threshold[t, bucket]
        index = np.where(own, bucket, self.alias[t, bucket])
        rank = np.where(own, r, (self.offset[t, bucket] + r) & 65535)
        return index, rank


class Stream:
    """The states of 32 lanes and the words that they share."""

    def __init__(self, states: bytes, words: bytes) -> None:
        halves = np.frombuffer(states, "<u2").astype(np.uint32)
        self.states = halves[:LANES] | halves[LANES:] << 16
        check((self.states >= BLOCK).all(), "a state at the start")
        self.n_words = len(words) // 2
        # The zeros stand for the words that lanes look at without taking them.
        self.words = np.append(np.frombuffer(words, "<u2"), np.zeros(LANES, np.uint16)).astype(np.uint32)
        self.next_word = 0

    def turn(self, tables: Tables, table: Any, lanes: int) -> Array:
        """A symbol from each of the first lanes. table: the one that codes them all, or one for each lane."""
        x = self.states[:lanes]
        index, rank = tables.look_up(table, x & 4095)
        x = tables.frequency[table, index] * (x >> 12) + rank
        ballot = x < BLOCK
        up_to_lane = np.cumsum(ballot)
        check(self.next_word + up_to_lane[-1] <= self.n_words, "a stream that ends early")
        x = np.where(ballot, x << 16 | self.words[self.next_word + up_to_lane - ballot], x)
        self.next_word += int(up_to_lane[-1])
        self.states[:lanes] = x
        symbols: Array = tables.symbol[table, index]
        return symbols

    def carried(self) -> Array:
        """The numbers that the lanes are left with."""
        check((self.states >> 16 == 1).all(), "a state at the end")
        check(self.next_word == self.n_words, "words that are left")
        numbers: Array = self.states & 65535
        return numbers


# ---- SPEC.md section 2: payloads ----


@dataclass
class Field:
    shift: int
    sym: int
    rest: int
    rotate: int

    @property
    def width(self) -> int:
        return self.sym + self.rest


@dataclass
class Model:
    tables: Tables
    choice: list[int]  # by group or by class


def read_model(cursor: Cursor, n_tables: int, n_choices: int, n_values: int) -> Model:
    tables = [read_table(cursor, n_values) for _ in range(n_tables)]
    choice = [0] * n_choices
    if n_tables >= 2:
        packed = bits(cursor.take(-(-n_choices // 2)), 4 * n_choices)
        choice = (packed.reshape(-1, 4) @ np.array([1, 2, 4, 8])).tolist()
        check(max(choice) < n_tables, "a choice without table")
    return Model(Tables(tables), choice)


@dataclass
class Head:
    length: int
    transform: int
    shift: int
    word_bytes: int
    n_words: int
    row_words: int
    fields: list[Field]
    palette: Array
    models: list[Model]  # one a field
    rows: Array  # numbers of the rows and of the columns; none without scales
    columns: Array
    index: list[tuple[int, int]]


def read_head(data: bytes, word_bytes: int, n_words: int, forms: Counter[str]) -> Head:
    cursor = Cursor(data)
    transform, shift, head_bytes, n_fields, log2, n_palette = cursor.take(6)
    scaled = cursor.number(1)
    cursor.zeros(1)
    check(scaled <= (transform in (PLAIN, HALF) and n_fields > 0), "scales that have no place")
    check(transform < len(TRANSFORMS), "a transform", "unsupported_feature")
    check(shift == 0 or transform in (PLAIN, HALF), "a shift that has no place")
    check(head_bytes == word_bytes, "bytes of a word")
    check(n_fields <= 8, "number of fields")
    check(n_fields == 0 or transform != BASE, "fields of a base difference")
    check(log2 == 16, "words of a block")
    check(1 <= n_palette <= 16 if transform == PALETTE else n_palette == 0, "words of a palette")
    check(cursor.number(8) == n_words, "number of words")
    row_words, before_index = cursor.number(4), cursor.number(4)
    check((row_words > 0) == (transform == ROW or scaled > 0), "words of a row")
    check(transform != HALF or word_bytes == 4, "half of another word than F32's")
    n_blocks = -(-n_words // BLOCK)
    check(len(data) == up(24 + before_index + 12 * n_blocks, 8), "length of the head")
    forms[f"transform.{TRANSFORMS[transform]}"] += 1
    forms[f"transform.{TRANSFORMS[transform]}.shifted"] += shift > 0

    fields = []
    n_tables = []
    for _ in range(1 if transform == BASE else n_fields):
        *parts, count = cursor.take(5)
        cursor.zeros(3)
        check(count <= 16, "a descriptor")
        fields.append(Field(*parts))
        n_tables.append(count)
    covered = 0
    width = {HALF: 16, PALETTE: 8}.get(transform, 8 * word_bytes) - shift
    check(width > 0, "a shift")
    for field in fields:
        if transform == BASE:
            check(field == Field(0, 0, 0, 0), "a descriptor")
            field.sym = 7
            continue
        check(1 <= field.sym <= 12 and field.rest <= 15 and field.width <= 24, "parts of a field")
        check(field.rotate <= (field.rest > 0), "a rotated field")
        mask = (1 << field.width) - 1 << field.shift
        check(not covered & mask, "fields that overlap")
        covered |= mask
        forms["field.rotated"] += field.rotate
    check(transform == BASE or not fields or covered == (1 << width) - 1, "fields that do not cover the word")
    check(fields or transform == PLAIN, "a transform without fields")

    palette = words_of(cursor.take(n_palette * word_bytes), word_bytes)
    check((palette[1:] > palette[:-1]).all(), "order of the palette")
    models = []
    for i, (field, count) in enumerate(zip(fields, n_tables)):
        by_class = transform == BASE or (scaled and i == 0)
        n_values = 8 * word_bytes + 1 if transform == BASE else 1 << field.sym
        models.append(read_model(cursor, count, 256 if by_class else -(-n_blocks // GROUP), n_values))
        forms["plane.tables_by_group"] += not by_class and len(set(models[-1].choice)) > 1
    rows, columns = read_scales(cursor, n_words, row_words, forms) if scaled else np.zeros((2, 0), "u1")
    cursor.align(4)
    check(cursor.at == 24 + before_index, "length of the models")
    index = [(cursor.number(4), cursor.number(8)) for _ in range(n_blocks)]
    cursor.align(8)
    return Head(
        len(data), transform, shift, word_bytes, n_words, row_words, fields, palette, models, rows, columns, index
    )


def read_scales(cursor: Cursor, n_words: int, row_words: int, forms: Counter[str]) -> tuple[Array, Array]:
    n_rows = -(-n_words // row_words)
    n, length = n_rows + row_words, cursor.number(4)
    check(16 * n <= n_words, "words of a row")
    check(length <= n <= 16 * length, "length of the scales")
    numbers = cursor.take(length)
    if length < n:
        check(n <= 1 << 19, "scales in a frame")
        numbers = zstd_frame(numbers, n)
    forms["scales.zstd" if length < n else "scales.raw"] += 1
    both = np.frombuffer(numbers, "u1")
    return both[:n_rows], both[n_rows:]


def read_plane(
    cursor: Cursor, width: int, n: int, forms: Counter[str], what: str, coded: Callable[[Stream], Array]
) -> Array:
    """coded: what to do with a stream."""
    kind = cursor.number(1)
    cursor.zeros(1)
    n_patches, argument = cursor.number(2), cursor.number(4)
    check(kind < len(PLANE_KINDS), "a plane's kind")
    name = PLANE_KINDS[kind]
    check(width <= 8 or name not in ("raw", "zstd"), "bytes of a wide part")
    check(n_patches == 0 or name not in ("raw", "zstd"), "patches that have no place")
    carried = np.zeros(0, np.uint32)
    if name == "raw":
        check(argument == 0, "a plane's reserved bytes")
        symbols = cursor.array(n, "u1").astype(np.uint32)
    elif name == "zstd":
        symbols = np.frombuffer(zstd_frame(cursor.take(argument), n), "u1").astype(np.uint32)
    elif name == "constant":
        check(argument < 1 << width, "a symbol too large")
        symbols = np.full(n, argument, np.uint32)
    else:
        stream = Stream(cursor.take(128), cursor.take(2 * argument))
        symbols = coded(stream)
        carried = stream.carried()
        check(not carried[2 * n_patches :].any(), "a lane that carries what is no patch")
        carried = carried[: 2 * n_patches]
        forms[f"{what}.{name}.ragged"] += n % LANES != 0
    cursor.align(4)
    stored = cursor.array(2 * n_patches - len(carried), "<u2")
    cursor.align(4)
    positions, values = np.concatenate([carried, stored]).astype(np.int64).reshape(2, n_patches)
    check((positions[1:] > positions[:-1]).all() and (positions < n).all(), "positions of patches")
    symbols[positions] = values
    check((symbols < 1 << width).all(), "a symbol too large")
    forms[f"{what}.{name}"] += 1
    forms[f"{what}.{name}.patched"] += n_patches > 0
    forms[f"{what}.{name}.patches_stored"] += len(stored) > 0
    return symbols.astype(np.uint64)


def count_tables(tables: Tables, chosen: Any, forms: Counter[str], what: str) -> None:
    used = np.unique(chosen)
    check(tables.count, "a coded plane without table")
    forms[f"{what}.tables_by_class"] += len(used) > 1
    for n in tables.buckets[used]:
        forms[f"{what}.buckets_{n}"] += 1


def read_field(cursor: Cursor, field: Field, model: Model, chosen: Any, n: int, forms: Counter[str]) -> Array:
    """chosen: the table of all symbols, or that of each."""

    def coded(stream: Stream) -> Array:
        count_tables(model.tables, chosen, forms, "plane.coded")
        each = np.broadcast_to(chosen, n)
        # The last turn may not need all lanes.
        turns = [each[start : start + LANES] for start in range(0, n, LANES)]
        return np.concatenate([stream.turn(model.tables, tables, len(tables)) for tables in turns])

    run = read_plane(cursor, field.sym, n, forms, "plane", coded)
    if field.rest:
        packed = bits(cursor.take(up(-(-n * field.rest // 8), 4)), n * field.rest)
        rest = packed.reshape(n, field.rest) @ (1 << np.arange(field.rest, dtype=np.uint64))
        run = run << np.uint64(field.rest) | rest
    if field.rotate:
        run = run >> np.uint64(1) | (run & np.uint64(1)) << np.uint64(field.width - 1)
    words: Array = run << np.uint64(field.shift)
    return words


def single_of_half(half: Array) -> Array:
    sign, exponent, mantissa = half >> 15 << 31, half >> 10 & 31, half & 1023
    p = np.zeros_like(half)  # place of a subnormal's leading one
    for bit in range(10):
        p[mantissa >> bit > 0] = bit
    subnormal = (p + 103) << 23 | mantissa << (23 - p) & 0x7FFFFF
    other = np.where(exponent == 31, 255, exponent + 112) << 23 | mantissa << 13
    single: Array = sign | np.where(exponent > 0, other, np.where(mantissa > 0, subnormal, 0))
    return single


def read_difference(cursor: Cursor, model: Model, base: Array, signed: bool, width: int, n: int, forms: Any) -> Array:
    chosen = np.array(model.choice)[(base >> np.uint64(max(0, width - 9)) & np.uint64(255)).astype(np.int64)]

    def coded(stream: Stream) -> Array:
        count_tables(model.tables, chosen, forms, "difference.coded")
        turns = [chosen[start : start + LANES] for start in range(0, n, LANES)]
        return np.concatenate([stream.turn(model.tables, tables, len(tables)) for tables in turns])

    length = read_plane(cursor, 7, n, forms, "difference", coded).astype(np.int64)
    check((length <= width).all(), "a difference too long")
    extra = np.maximum(length - 1, 0)
    total = int(extra.sum())
    string = bits(cursor.take(up(-(-total // 8), 4)), total).astype(np.uint64)
    first = np.cumsum(extra) - extra
    one = np.uint64(1)
    z = np.where(length > 0, one << extra.astype(np.uint64), np.uint64(0))
    for bit in range(int(extra.max())):
        has = extra > bit
        z[has] |= string[first[has] + bit] << np.uint64(bit)
    sign = np.uint64(1 << width - 1)
    mask = sign | sign - one
    d = np.where(z & one > 0, ~(z >> one), z >> one)  # modulo 2^64, which 2^width divides
    words: Array
    if signed:
        ascending = (np.where(base & sign > 0, ~base, base | sign) + d) & mask
        words = np.where(ascending & sign > 0, ascending ^ sign, ~ascending) & mask
    else:
        words = (base + d) & mask
    return words


def read_block(block: bytes, number: int, head: Head, base: Array | None, signed: bool, forms: Counter[str]) -> Array:
    """The source's words of a block."""
    n = min(BLOCK, head.n_words - number * BLOCK)
    cursor = Cursor(block)
    kind = cursor.number(1)
    cursor.zeros(3)
    check(kind < len(BLOCK_KINDS), "a block's kind")
    forms[f"block.{BLOCK_KINDS[kind]}"] += 1
    size = n * head.word_bytes
    if BLOCK_KINDS[kind] == "stored":
        words = words_of(cursor.take(size), head.word_bytes)
    elif BLOCK_KINDS[kind] == "zstd":
        words = words_of(zstd_frame(cursor.take(cursor.number(4)), size), head.word_bytes)
    else:
        check(head.fields, "a coded block without fields")
        if head.transform == BASE:
            assert base is not None
            of_block = base[number * BLOCK :][:n]
            words = read_difference(cursor, head.models[0], of_block, signed, 8 * head.word_bytes, n, forms)
        else:
            words = np.zeros(n, np.uint64)
            for i, (field, model) in enumerate(zip(head.fields, head.models)):
                chosen: Any = model.choice[number // GROUP]
                if i == 0 and len(head.rows):
                    place = number * BLOCK + np.arange(n)
                    both = head.rows[place // head.row_words] + head.columns[place % head.row_words]  # modulo 256
                    chosen = np.array(model.choice)[both]
                words |= read_field(cursor, field, model, chosen, n, forms)
            words <<= np.uint64(head.shift)
            words = restore(words, head)
    last = number == len(head.index) - 1
    check(len(block) - cursor.at < (64 if last else 8) and len(block) % 8 == 0, "length of a block")
    cursor.zeros(len(block) - cursor.at)
    return words


def restore(words: Array, head: Head) -> Array:
    """Takes the transforms within one tensor back."""
    if head.transform == HALF:
        words = single_of_half(words.astype(np.int64)).astype(np.uint64)
    elif head.transform == PALETTE:
        check((words < len(head.palette)).all(), "a word beside the palette")
        words = head.palette[words.astype(np.int64)]
    elif head.transform == ROW and head.row_words < len(words):
        rows = np.zeros(up(len(words), head.row_words), np.uint64)
        rows[: len(words)] = words
        # Sums modulo 2^64 are right modulo any lower power of two.
        summed = np.cumsum(rows.reshape(-1, head.row_words), axis=0, dtype=np.uint64).ravel()[: len(words)]
        words = summed & np.uint64((1 << 8 * head.word_bytes) - 1)
    return words


def read_payload(payload: bytes, entry: Entry, base: bytes | None, forms: Counter[str]) -> bytes:
    _, _, word_bytes, signed = DTYPES[entry.dtype]
    n_blocks = -(-entry.size // (word_bytes * BLOCK))
    longest = 1024 + min(entry.size, 379392) + entry.size // 4096
    check(24 + 12 * n_blocks <= entry.head <= min(longest, len(payload)), "length of the head")
    check(f"{xxh3(payload[: entry.head]):016x}" == entry.checksum, "head", "checksum")
    head = read_head(payload[: entry.head], word_bytes, entry.size // word_bytes, forms)
    check((head.transform == BASE) == (entry.codec == "bs_delta"), "codec and transform")
    check(head.length + sum(length for length, _ in head.index) == len(payload), "lengths of the blocks")
    base_words = None if base is None else words_of(base, word_bytes)
    words = []
    at = head.length
    for number, (length, checksum) in enumerate(head.index):
        block = payload[at : at + length]
        at += length
        check(xxh3(block) == checksum, "block", "checksum")
        words.append(read_block(block, number, head, base_words, signed, forms))
    return np.concatenate(words).astype(f"<u{word_bytes}").tobytes()


# ---- FORMAT.md: the container ----


def read_json(data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        check(len(dict(pairs)) == len(pairs), "a key that is repeated")
        return dict(pairs)

    constant: Callable[[str], NoReturn] = refuse  # NaN and infinities are no JSON
    try:
        text = data.decode("utf-8")
        found = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # fails on lone surrogates
    except (ValueError, RecursionError) as error:
        refuse(f"JSON: {error}")
    check(isinstance(found, dict), "a header that is no object")
    return dict(found)


def get(where: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value: Any = where.get(key, default)
    check(type(value) is kind, f"header: {key}")  # True is no number here
    check(kind is not int or value >= 0, f"header: {key}")
    return value


@dataclass
class Entry:
    """A tensor of the header."""

    name: str
    dtype: str
    shape: list[int]
    codec: str
    length: int
    offset: int
    md5: str
    size: int
    head: int = 0
    checksum: str = ""
    base_md5: str = ""
    tied_to: str = ""
    shard: str = ""


def read_entry(fields: Any) -> Entry:
    check(type(fields) is dict, "a tensor that is no object")
    dtype, codec = get(fields, "dtype", str), get(fields, "codec", str)
    check(codec in (*CODECS, "tied_ref"), f"codec {codec}", "unsupported_codec")
    check(dtype in DTYPES, f"dtype {dtype}", "unsupported_feature")
    shape = get(fields, "shape", list)
    check(len(shape) <= 64 and all(type(n) is int and n >= 0 for n in shape), "a shape")
    # F4 and F6 have their bytes in the shape.
    size = math.prod(shape) * max(1, DTYPES[dtype][1] // 8)
    check(math.prod(n for n in shape if n) < 1 << 60, "a shape too large")
    entry = Entry(
        get(fields, "name", str),
        dtype,
        shape,
        codec,
        get(fields, "compressed_bytes", int),
        get(fields, "offset", int),
        get(fields, "md5", str),
        size,
    )
    extra = fields.get("extra") or {}
    check(type(extra) is dict, "extra")
    if codec == "tied_ref":
        entry.tied_to = get(extra, "tied_to", str)
        entry.shard = get(extra, "shard", str, "")
        check(not set("/\\") & set(entry.shard) and entry.shard not in (".", ".."), "a shard's name")
        check(entry.length == 0, "bytes of a tie")
    elif size == 0:
        check(entry.length == 0, "bytes of nothing")
    else:
        entry.head, entry.checksum = get(extra, "head", int), get(extra, "checksum", str)
        if codec == "bs_delta":
            entry.base_md5 = get(extra, "base_md5", str)
    return entry


def is_ours(header: Mapping[str, Any]) -> bool:
    tensors = header.get("tensors")
    codecs = [t.get("codec") for t in tensors if type(t) is dict] if type(tensors) is list else []
    return "writer" in header or "draft" in header or any(codec in CODECS for codec in codecs)


def shape_in_header(dtype: str, shape: list[int]) -> list[int]:
    bits_of_value = DTYPES[dtype][1]
    if bits_of_value >= 8:
        return shape
    n_bits = math.prod(shape) * bits_of_value
    check(n_bits % 8 == 0, "half a byte")
    if bits_of_value == 4 and shape and shape[-1] % 2 == 0:
        return [*shape[:-1], shape[-1] // 2]
    return [n_bits // 8]


class BsFile:
    """A file whose structure has been checked; `forms` counts what occurred in the tensors read so far."""

    def __init__(self, path: Path | str, base: Mapping[str, bytes] | None = None) -> None:
        self.path = Path(path)
        self.base = base
        self.forms: Counter[str] = Counter()
        self.data = self.path.read_bytes()
        self.header = self._open()
        self.source_header = self._source_header()

    def _open(self) -> dict[str, Any]:
        data = self.data
        check(data[:4] == b"BGSM", "no .bs file")
        check(len(data) >= 10, "cut short", "truncated")
        version, header_length = struct.unpack("<HI", data[4:10])
        check(version == 1, "container version", "unsupported_version")
        check(header_length <= min(100_000_000, len(data) - 10), "length of the header")
        start = 10 + header_length
        trailer = data[-48:]
        magic, at, length, header_hash, parity_hash, own_hash = struct.unpack("<8s5Q", trailer.rjust(48, b"\0"))
        intact = magic == b"BGSMEND\n" and xxh3(trailer[:40]) == own_hash
        if not intact:
            ours = is_ours(read_json(data[10:start]))
            refuse("no intact trailer", "truncated" if ours else "unsupported_codec")
        check(at == start and start + length + 48 == len(data), "lengths of the trailer")
        check(xxh3(data[:start]) == header_hash, "header", "checksum")
        header = read_json(data[10:start])
        check(header.get("draft") == 3, "draft", "unsupported_version")
        check(not get(header, "requires", list, []), "a feature that is required", "unsupported_feature")
        self.start = start
        self._read_tensors(header, length)
        parity = self.sections.get("parity")
        check(parity is not None or parity_hash == 0, "a section that is not there", "unsupported_feature")
        check(parity is None or xxh3(parity) == parity_hash, "parity", "checksum")
        return header

    def _read_tensors(self, header: dict[str, Any], data_length: int) -> None:
        self.entries: dict[str, Entry] = {}
        tensors = get(header, "tensors", list)
        check(get(header, "tensor_count", int) == len(tensors), "number of tensors")
        at = 0
        for fields in tensors:
            entry = read_entry(fields)
            check(entry.name not in self.entries, "a name listed twice")
            self.entries[entry.name] = entry
            if entry.codec != "tied_ref" and entry.size:
                check(entry.length and entry.length % 64 == 0 and entry.offset == at, "payloads that do not tile")
                at += entry.length
        for entry in self.entries.values():
            if entry.tied_to and not entry.shard:
                check(entry.tied_to in self.entries, "a tie to nothing")
                self._check_tie(entry, self.entries[entry.tied_to])
        self.sections: dict[str, bytes] = {}
        for section in get(header, "sections", list):
            check(type(section) is dict, "a section that is no object")
            kind, length = get(section, "kind", str), get(section, "length", int)
            optional = get(section, "optional", bool, False)
            check(kind == "source_header" or optional, f"section {kind}", "unsupported_feature")
            check(kind not in self.sections, "a section listed twice")
            check(get(section, "offset", int) == at and length % 64 == 0, "sections that do not tile")
            check(at + length <= data_length, "sections that do not tile")
            content = self.data[self.start + at :][:length]
            covered = content[:64] if kind == "parity" else content
            check(f"{xxh3(covered):016x}" == get(section, "checksum", str), "section", "checksum")
            self.sections[kind] = content
            at += length
        check(at == data_length, "a data section of another length")
        has_data = any(entry.size for entry in self.entries.values())
        check(self.start % (4096 if has_data else 64) == 0, "where the data begins")

    @staticmethod
    def _check_tie(entry: Entry, target: Entry) -> None:
        check(target.codec != "tied_ref", "a tie to a tie")
        check(target.size == entry.size and target.md5 == entry.md5, "a tie to other bytes")

    def _source_header(self) -> bytes:
        check("source_header" in self.sections, "no source header")
        cursor = Cursor(self.sections["source_header"])
        frame_length, length = cursor.number(4), cursor.number(4)
        content = zstd_frame(cursor.take(frame_length), length)
        cursor.align(64)
        check(cursor.at == len(cursor.data), "length of the source header")
        check(length >= 8 and int.from_bytes(content[:8], "little") == length - 8, "length of the source header")
        source = read_json(content[8:])
        check(source.pop("__metadata__", None) == self.header.get("safetensors_metadata"), "metadata of the source")
        check(source.keys() == self.entries.keys(), "tensors of the source")
        self.places: dict[str, int] = {}
        at = 0
        for name, fields in sorted(source.items(), key=lambda item: item[1]["data_offsets"]):
            entry = self.entries[name]
            begin, end = fields["data_offsets"]
            check(fields["dtype"] == DTYPES[entry.dtype][0], f"dtype of {name}")
            check(shape_in_header(entry.dtype, fields["shape"]) == entry.shape, f"shape of {name}")
            check(begin == at and end - begin == entry.size, f"place of {name}")
            self.places[name] = begin
            at = end
        return content

    def tensor(self, name: str) -> bytes:
        entry = self.entries[name]
        base = None
        if entry.codec == "tied_ref":
            self.forms["tie"] += 1
            if entry.shard:
                self.forms["tie.shard"] += 1
                other = BsFile(self.path.with_name(entry.shard), self.base)
                check(entry.tied_to in other.entries, "a tie to nothing")
                self._check_tie(entry, other.entries[entry.tied_to])
                return other.tensor(entry.tied_to)
            return self.tensor(entry.tied_to)
        if entry.codec == "bs_delta" and entry.size:
            base = (self.base or {}).get(name)
            if base is None or len(base) != entry.size or hashlib.md5(base).hexdigest() != entry.base_md5:
                refuse(f"base of {name}", "wrong_base")
        found = b""
        if entry.size:
            self.forms[f"codec.{entry.codec}"] += 1
            payload = self.data[self.start + entry.offset :][: entry.length]
            found = read_payload(payload, entry, base, self.forms)
        check(len(found) == entry.size, "size of a tensor")
        check(hashlib.md5(found).hexdigest() == entry.md5, f"MD5 of {name}", "checksum")
        return found

    def tensors(self) -> dict[str, bytes]:
        return {name: self.tensor(name) for name in self.entries}

    def source(self) -> bytes:
        """The `.safetensors` file."""
        found = bytearray(self.source_header)
        found.extend(bytes(sum(entry.size for entry in self.entries.values())))
        for name, data in self.tensors().items():
            begin = len(self.source_header) + self.places[name]
            found[begin : begin + len(data)] = data
        expected = self.header.get("sha256")
        check(expected in (None, hashlib.sha256(found).hexdigest()), "SHA-256 of the source", "checksum")
        return bytes(found)


if __name__ == "__main__":
    file = BsFile(sys.argv[1], BsFile(sys.argv[2]).tensors() if len(sys.argv) > 2 else None)
    file.source()
    for form, count in sorted(file.forms.items()):
        print(f"{count:8} {form}")
