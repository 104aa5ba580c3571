"""Runs what Triton compiled for sm_90, without a GPU: the PTX of one program at a time, all its threads in step.

Triton's interpreter runs a kernel's source and never sees the compiled code; nor does it multiply bfloat16 matrices
rightly. This sees layouts, swizzles, tensor-core fragments and barriers as the compiler chose them. It knows the
instructions that this project's kernels compile to, and raises `Unknown` at any other.

Beside the numbers it looks for hazards in shared memory: a value read or overwritten by another warp than the one that
wrote or read it with no barrier between, and one that `wgmma` reads with no proxy fence after it was written.
Asynchronous copies land when they are waited for, and `wgmma` computes at once.

Source: the PTX ISA, sections "Instruction Set" and "Asynchronous Warpgroup Level Matrix Instructions".
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

WARP = 32
SHARED = 227 * 1024  # bytes that a program can have


class Unknown(Exception):
    """An instruction that nobody has taught this interpreter."""


def decode(raw: np.ndarray, kind: str) -> np.ndarray:
    """Registers, uint64, as numbers of a PTX type: int64, uint64, bool or float64."""
    if kind == "pred":
        return raw.astype(bool)
    if kind == "f32":
        return raw.astype(np.uint32).view(np.float32).astype(np.float64)
    if kind == "tf32":  # a float32 whose last 13 bits tensor cores do not look at
        return (raw.astype(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if kind == "bf16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if kind == "f16":
        return raw.astype(np.uint16).view(np.float16).astype(np.float64)
    bits = int(kind[1:])
    if bits == 64:
        return raw.view(np.int64) if kind[0] == "s" else raw
    value = (raw & np.uint64(2**bits - 1)).astype(np.int64)
    return np.where(value >> (bits - 1) & 1, value - 2**bits, value) if kind[0] == "s" else value


def encode(value: np.ndarray, kind: str) -> np.ndarray:
    """The reverse of `decode`, rounding to nearest even."""
    if kind == "pred":
        return value.astype(np.uint64)
    if kind == "f32":
        return value.astype(np.float32).view(np.uint32).astype(np.uint64)
    if kind == "bf16":
        raw = value.astype(np.float32).view(np.uint32)
        rounded = (raw + np.uint32(0x7FFF) + (raw >> 16 & 1)) >> 16
        return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint64)
    if kind == "f16":
        return value.astype(np.float16).view(np.uint16).astype(np.uint64)
    bits = int(kind[1:])
    whole = value if value.dtype == np.uint64 else value.astype(np.int64).view(np.uint64)
    return whole if bits == 64 else whole & np.uint64(2**bits - 1)


COMPARISONS: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "neu": np.not_equal, "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b), "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum, "neg": np.negative,
    "abs": np.abs, "mad": lambda a, b, c: a * b + c, "fma": lambda a, b, c: a * b + c, "div": np.divide,
    "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a), "rcp": lambda a: 1 / a, "ex2": np.exp2, "lg2": np.log2,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
NOTHING = ("wgmma.fence", "wgmma.commit_group", "wgmma.wait_group", "membar", "fence.acq", "griddepcontrol", "prefetch")
SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "b32": 4, "u32": 4, "f32": 4, "b64": 8, "u64": 8}


def unpack(raw: np.ndarray, kind: str) -> list[np.ndarray]:
    """The one or two numbers of tensor cores in registers of 32 bits."""
    if kind == "tf32":
        return [decode(raw, kind)]
    return [decode(raw >> np.uint64(shift) & np.uint64(0xFFFF), kind) for shift in (0, 16)]


def operands(text: str) -> list[str]:
    """Split at the commas that are not in brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,])+", text)]


def members(operand: str) -> list[str]:
    """The registers of a vector operand, or the one of another."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


class Kernel:
    """A compiled kernel; `run` executes one program of it.

    Args:
        ptx: its text.
        threads: of a program.
    """

    def __init__(self, ptx: str, threads: int) -> None:
        self.threads = threads
        self.instructions: list[tuple[str, str, list[str]]] = []  # guard, name, operands
        self.labels: dict[str, int] = {}
        body = re.sub(r"//[^\n]*", "", ptx[ptx.index("{", ptx.index(".entry")) + 1 :])
        for line in re.split(r"[;\n]", body):
            text = re.sub(r"\s+", " ", line).strip()
            if label := re.match(r"(\$\w+):", text):
                self.labels[label[1]] = len(self.instructions)
            elif text and text[0] not in "{}.$":
                guard, name, rest = re.match(r"(?:@(!?%\w+) )?(\S+) ?(.*)", text).groups()
                self.instructions.append((guard or "", name.replace("::cta", ""), operands(rest)))

    def run(
        self, parameters: Sequence[int], program: Sequence[int], grid: Sequence[int], memory: dict[int, np.ndarray]
    ) -> list[str]:
        """Run the program with this index and return its hazards.

        Args:
            parameters: of the kernel, addresses among them.
            memory: first address -> bytes, of everything that it may touch.
        """
        self.parameters, self.memory = parameters, memory
        self.registers: dict[str, np.ndarray] = {"%tid.x": np.arange(self.threads, dtype=np.uint64)}
        for axis, index, size in zip("xyz", program, grid, strict=True):
            self.registers[f"%ctaid.{axis}"] = np.full(self.threads, index, np.uint64)
            self.registers[f"%nctaid.{axis}"] = np.full(self.threads, size, np.uint64)
        self.shared = np.zeros(SHARED, np.uint8)
        self.barriers = self.fences = 0  # so many were passed
        self.written = np.full((3, SHARED), -1)  # in each byte's last write: barriers, fences, warp
        self.read = np.full((SHARED, self.threads // WARP), -1)  # barriers at each warp's last read
        self.copies: list[list[tuple[Any, ...]]] = [[]]  # asynchronous ones, by group; the last group is open
        self.hazards: list[str] = []
        self.at = 0
        while self.at < len(self.instructions):
            guard, name, arguments = self.instructions[self.at]
            self.at += 1
            active = np.ones(self.threads, bool)
            if guard:
                active = self.value(guard.lstrip("!"), "pred") ^ guard.startswith("!")
            if name == "ret":
                break
            with np.errstate(all="ignore"):
                self.execute(name, name.split("."), arguments, active)
        return self.hazards

    # Registers and memory.

    def raw(self, operand: str) -> np.ndarray:
        if operand.startswith("%"):  # the compiler leaves halves undefined that nobody reads
            return self.registers.get(operand, np.zeros(self.threads, np.uint64))
        number = 0 if operand.startswith("global_smem") else int(operand.rstrip("U").replace("0f", "0x"), 0)
        return np.full(self.threads, number & 2**64 - 1, np.uint64)

    def value(self, operand: str, kind: str) -> np.ndarray:
        return decode(self.raw(operand), kind)

    def put(self, register: str, value: np.ndarray, kind: str, active: np.ndarray) -> None:
        if register != "_":
            self.registers[register] = np.where(active, encode(value, kind), self.raw(register))

    def address(self, operand: str) -> np.ndarray:
        base, offset = re.fullmatch(r"\[ ?([%\w.]+) ?(?:\+ ?(-?\w+))? ?\]", operand).groups()
        return self.raw(base).astype(np.int64) + int(offset or "0", 0)

    def bytes_at(self, address: int, count: int) -> np.ndarray:
        for first, content in self.memory.items():
            if first <= address and address + count <= first + len(content):
                return content[address - first : address - first + count]
        raise AssertionError(f"instruction {self.at - 1} reaches outside the tensors: {self.instructions[self.at - 1]}")

    def note_read(self, place: slice | np.ndarray, warp: int, by_wgmma: bool = False) -> None:
        barriers, fences, writer = self.written[:, place]
        if ((barriers == self.barriers) & (writer != warp)).any():
            self.hazards.append(f"{self.instructions[self.at - 1][1]}: no barrier since another warp wrote")
        if by_wgmma and ((writer >= 0) & (fences == self.fences)).any():
            self.hazards.append("wgmma: no fence since the value was written")
        self.read[place, warp] = self.barriers

    def note_write(self, place: slice, warp: int) -> None:
        others = np.arange(self.read.shape[1]) != warp
        name = self.instructions[self.at - 1][1]
        if (self.read[place][:, others] == self.barriers).any():
            self.hazards.append(f"{name}: no barrier since another warp read")
        if ((self.written[0, place] == self.barriers) & (self.written[2, place] != warp)).any():
            self.hazards.append(f"{name}: no barrier since another warp wrote something else")
        self.written[:, place] = [[self.barriers], [self.fences], [warp]]

    def store_shared(self, address: int, data: np.ndarray, warp: int) -> None:
        place = slice(address, address + len(data))
        # Warps that hold copies of a value may all write it.
        if not ((self.written[0, place] == self.barriers).all() and (self.shared[place] == data).all()):
            self.note_write(place, warp)
        self.shared[place] = data

    # Instructions.

    def execute(self, name: str, parts: list[str], arguments: list[str], active: np.ndarray) -> None:
        first, kind = parts[0], parts[-1]
        if name.startswith(NOTHING):
            return
        if first == "bar":
            self.barriers += 1
        elif name.startswith("fence.proxy.async"):
            self.fences += 1
        elif first == "bra":
            assert active.all() or not active.any(), "threads of a program part ways"
            if active.all():
                self.at = self.labels[arguments[0]]
        elif name.startswith("ld.param"):
            number = self.parameters[int(re.search(r"_param_(\d+)", arguments[1])[1])]
            self.put(arguments[0], np.full(self.threads, number & 2**64 - 1, np.uint64), "b64", active)
        elif first in ("ld", "st"):
            self.move(first, parts, arguments, active)
        elif name.startswith("cp.async"):
            self.copy(name, arguments, active)
        elif first in ("ldmatrix", "stmatrix"):
            self.matrices(first, "trans" in parts, arguments)
        elif name.startswith("wgmma.mma_async"):
            self.wgmma(name, arguments)
        elif name.startswith("mma.sync"):
            self.mma(name, arguments)
        elif name.startswith("shfl.sync"):
            lane = np.arange(self.threads)
            other = self.value(arguments[2], "u32") % WARP
            source = lane // WARP * WARP + (lane % WARP ^ other if "bfly" in parts else other)
            self.put(arguments[0].split("|")[0], self.raw(arguments[1])[source], "b32", active)
        elif first == "mov":
            self.mov(kind, arguments, active)
        elif first == "setp":
            self.setp(parts[1], kind, arguments, active)
        elif first == "selp":
            chosen = np.where(self.value(arguments[3], "pred"), self.raw(arguments[1]), self.raw(arguments[2]))
            self.put(arguments[0], chosen, "b64", active)
        elif first == "cvt":
            self.convert(parts, arguments, active)
        elif first in ("shl", "shr"):
            value, shift = self.value(arguments[1], kind), self.value(arguments[2], "u32")
            shifted = value << shift.astype(value.dtype) if first == "shl" else value >> shift.astype(value.dtype)
            self.put(arguments[0], shifted, kind, active)
        elif first == "bfe":
            start, length = int(arguments[2]), int(arguments[3])
            field = (self.raw(arguments[1]) >> np.uint64(start)) & np.uint64(2**length - 1)
            self.put(arguments[0], decode(field, f"{kind[0]}{length}"), kind, active)
        elif first == "not":
            self.put(arguments[0], ~self.value(arguments[1], kind), kind, active)
        elif first == "prmt":
            both = self.value(arguments[1], "u32") | self.value(arguments[2], "u32") << 32
            chosen = [int(arguments[3].rstrip("U"), 0) >> 4 * i & 15 for i in range(4)]
            if max(chosen) > 7:
                raise Unknown(name)
            self.put(
                arguments[0], sum((both >> 8 * byte & 255) << 8 * i for i, byte in enumerate(chosen)), kind, active
            )
        elif first in ARITHMETIC and kind.endswith("x2") and first in ("add", "sub"):
            halves = [
                np.stack((decode(v, "u16"), decode(v >> np.uint64(16), "u16"))) for v in map(self.raw, arguments[1:])
            ]
            low, high = ARITHMETIC[first](*halves)
            self.put(arguments[0], (low & 0xFFFF) | (high & 0xFFFF) << 16, "b32", active)
        elif first in ARITHMETIC and re.fullmatch(r"pred|f32|[bsu](16|32|64)", kind):
            self.arithmetic(first, parts, kind, arguments, active)
        else:
            raise Unknown(f"{name} {', '.join(arguments)}")

    def arithmetic(self, first: str, parts: list[str], kind: str, arguments: list[str], active: np.ndarray) -> None:
        values = [self.value(argument, kind) for argument in arguments[1:]]
        if "wide" in parts or "hi" in parts:
            wider = f"{kind[0]}{2 * int(kind[1:])}"
            product = values[0] * values[1]
            if "hi" in parts:
                self.put(arguments[0], product >> int(kind[1:]), kind, active)
            elif first == "mad":
                self.put(arguments[0], product + self.value(arguments[3], f"s{wider[1:]}"), wider, active)
            else:
                self.put(arguments[0], product, wider, active)
        else:
            self.put(arguments[0], ARITHMETIC[first](*values), kind, active)

    def mov(self, kind: str, arguments: list[str], active: np.ndarray) -> None:
        target, source = arguments
        if target.startswith("{") or source.startswith("{"):
            vector = members(target if target.startswith("{") else source)
            bits = int(kind[1:]) // len(vector)
            if target.startswith("{"):
                for i, register in enumerate(vector):
                    self.put(register, self.raw(source) >> np.uint64(i * bits), f"b{bits}", active)
                return
            parts = [
                self.value(register, f"b{bits}").astype(np.uint64) << np.uint64(i * bits)
                for i, register in enumerate(vector)
            ]
            self.put(target, np.bitwise_or.reduce(parts), kind, active)
        else:
            self.put(target, self.raw(source), "b64", active)

    def setp(self, comparison: str, kind: str, arguments: list[str], active: np.ndarray) -> None:
        compare = COMPARISONS[comparison]
        if kind.endswith("x2"):
            low, high = (operand.strip() for operand in arguments[0].split("|"))
            for register, shift in ((low, 0), (high, 16)):
                halves = [decode(self.raw(a) >> np.uint64(shift) & np.uint64(0xFFFF), kind[:-2]) for a in arguments[1:]]
                self.put(register, compare(*halves), "pred", active)
        else:
            self.put(arguments[0], compare(*(self.value(a, kind) for a in arguments[1:3])), "pred", active)

    def convert(self, parts: list[str], arguments: list[str], active: np.ndarray) -> None:
        to, source = parts[-2], parts[-1]
        if to.endswith("x2"):
            high, low = (encode(self.value(a, source), to[:-2]) for a in arguments[1:])
            self.put(arguments[0], high << np.uint64(16) | low, "b32", active)
        else:
            self.put(arguments[0], self.value(arguments[1], source), to, active)

    def move(self, first: str, parts: list[str], arguments: list[str], active: np.ndarray) -> None:
        """ld and st, global and shared."""
        in_shared, size = "shared" in parts, SIZES[parts[-1]]
        integer = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[size]
        place, vector = (arguments[1], arguments[0]) if first == "ld" else arguments[:2]
        addresses, registers = self.address(place), members(vector)
        data = np.zeros((self.threads, size * len(registers)), np.uint8)
        if first == "st":
            data = np.concatenate([self.raw(r).astype(integer)[:, None].view(np.uint8) for r in registers], axis=1)
        for thread in np.nonzero(active)[0]:
            address, count = int(addresses[thread]), data.shape[1]
            if first == "ld" and in_shared:
                self.note_read(slice(address, address + count), thread // WARP)
                data[thread] = self.shared[address : address + count]
            elif first == "ld":
                data[thread] = self.bytes_at(address, count)
            elif in_shared:
                self.store_shared(address, data[thread], thread // WARP)
            else:
                self.bytes_at(address, count)[:] = data[thread]
        if first == "ld":
            for register, column in zip(registers, data.view(integer).T, strict=True):
                self.put(register, column.astype(np.uint64), "b64", active)

    def copy(self, name: str, arguments: list[str], active: np.ndarray) -> None:
        """cp.async: nothing is in shared memory until its group is waited for."""
        if name.startswith("cp.async.commit_group"):
            self.copies.append([])
        elif name.startswith("cp.async.wait"):
            open_groups = int(arguments[0]) if arguments and arguments[0] else 0
            done = self.copies[: len(self.copies) - 1 - open_groups]
            self.copies = self.copies[len(done) :]
            for address, data, warp in (each for group in done for each in group):
                self.store_shared(address, data, warp)
                self.written[1, address : address + len(data)] = -1  # compilers count on it that these need no fence
        else:
            targets, sources, count = self.address(arguments[0]), self.address(arguments[1]), int(arguments[2], 0)
            given = self.value(arguments[3], "u32") if len(arguments) > 3 else np.full(self.threads, count)
            for thread in np.nonzero(active)[0]:
                data = np.zeros(count, np.uint8)
                if given[thread]:
                    data[: given[thread]] = self.bytes_at(int(sources[thread]), int(given[thread]))
                address, warp = int(targets[thread]), thread // WARP
                others = np.arange(self.read.shape[1]) != warp
                if (self.read[address : address + count][:, others] == self.barriers).any():
                    self.hazards.append("cp.async: no barrier since another warp read")
                self.copies[-1].append((address, data, warp))

    def matrices(self, first: str, transposed: bool, arguments: list[str]) -> None:
        """ldmatrix and stmatrix: 8 x 8 matrices of 16-bit values, a row from each of eight threads' addresses."""
        place, vector = (arguments[1], arguments[0]) if first == "ldmatrix" else arguments[:2]
        addresses, lane = self.address(place), np.arange(WARP)
        for number, register in enumerate(members(vector)):
            values = self.raw(register).copy()
            for warp in range(self.threads // WARP):
                threads = slice(warp * WARP, warp * WARP + WARP)
                rows = [int(addresses[warp * WARP + number * 8 + i]) for i in range(8)]
                if first == "ldmatrix":
                    for row in rows:
                        self.note_read(slice(row, row + 16), warp)
                    matrix = np.stack([self.shared[row : row + 16].view(np.uint16) for row in rows]).astype(np.uint64)
                    matrix = matrix.T if transposed else matrix
                    pairs = matrix[lane // 4, lane % 4 * 2], matrix[lane // 4, lane % 4 * 2 + 1]
                    values[threads] = pairs[0] | pairs[1] << np.uint64(16)
                else:
                    matrix = np.zeros((8, 8), np.uint16)
                    for half in range(2):
                        matrix[lane // 4, lane % 4 * 2 + half] = values[threads] >> np.uint64(16 * half) & np.uint64(
                            0xFFFF
                        )
                    matrix = np.ascontiguousarray(matrix.T if transposed else matrix)
                    for row, content in zip(rows, matrix, strict=True):
                        self.store_shared(row, content.view(np.uint8), warp)
            if first == "ldmatrix":
                self.registers[register] = values

    def fragments(self, registers: list[str], kind: str, threads: slice) -> np.ndarray:
        """A matrix of 32 bytes a row. Thread t of a warp holds what is at row t / 4 and the four bytes t % 4, registers
        going down 8 rows first and right 16 bytes then; warps are 16 rows apart."""
        thread = np.arange(threads.stop - threads.start)
        held = [unpack(self.raw(register)[threads], kind) for register in registers]
        each = len(held[0])
        matrix = np.zeros((len(thread) // 2, 8 * each))
        for number, values in enumerate(held):
            row, column = (
                thread // WARP * 16 + thread % WARP // 4 + number % 2 * 8,
                (thread % 4 + number // 2 * 4) * each,
            )
            for i, value in enumerate(values):
                matrix[row, column + i] = value
        return matrix

    def accumulate(
        self, targets: list[str], sources: list[str], product: np.ndarray, threads: slice, keep: bool
    ) -> None:
        """target = source + product, in float32; pairs of columns, then rows 8 down, then columns 8 to the right."""
        thread = np.arange(threads.stop - threads.start)
        for number, (target, source) in enumerate(zip(targets, sources, strict=True)):
            row = thread // WARP * 16 + thread % WARP // 4 + number // 2 % 2 * 8
            column = number // 4 * 8 + thread % 4 * 2 + number % 2
            values = self.raw(target).copy()
            before = decode(self.raw(source)[threads], "f32") if keep else 0.0
            values[threads] = encode(before + product[row, column], "f32")
            self.registers[target] = values

    def mma(self, name: str, arguments: list[str]) -> None:
        shape = re.search(r"m16n8k(?:16\.row\.col\.f32\.(f16|bf16)|8\.row\.col\.f32\.(tf32))\.\w+\.f32", name)
        if not shape:
            raise Unknown(name)
        kind = shape[1] or shape[2]
        targets, a, b, sources = map(members, arguments)
        for warp in range(self.threads // WARP):
            threads, lane = slice(warp * WARP, warp * WARP + WARP), np.arange(WARP)
            left = self.fragments(a, kind, threads)
            right = np.zeros((left.shape[1], 8))
            for number, register in enumerate(b):
                values = unpack(self.raw(register)[threads], kind)
                for i, value in enumerate(values):
                    right[(lane % 4 + number * 4) * len(values) + i, lane // 4] = value
            self.accumulate(targets, sources, left @ right, threads, True)

    def wgmma(self, name: str, arguments: list[str]) -> None:
        shape = re.search(r"m64n(\d+)k(?:16\.f32\.(f16|bf16)|8\.f32\.(tf32))\.", name)
        if not shape:
            raise Unknown(name)
        columns, kind = int(shape[1]), shape[2] or shape[3]
        targets, in_registers = members(arguments[0]), arguments[1].startswith("{")
        # Of what lies in shared memory: A if there, B. TF32 has no such operands.
        transposed = [argument == "1" for argument in arguments[6:]] or [False]
        for first in range(0, self.threads, 4 * WARP):
            threads = slice(first, first + 4 * WARP)
            if in_registers:
                left = self.fragments(members(arguments[1]), kind, threads)
            else:
                left = self.from_shared(int(self.raw(arguments[1])[first]), 64, kind, transposed[0], first // WARP)
            right = self.from_shared(int(self.raw(arguments[2])[first]), columns, kind, transposed[-1], first // WARP)
            scale = arguments[3]
            keep = bool(self.raw(scale)[first]) if scale.startswith("%") else scale != "0"
            self.accumulate(targets, targets, left @ right.T, threads, keep)

    def from_shared(self, descriptor: int, rows: int, kind: str, transposed: bool, first_warp: int) -> np.ndarray:
        """An operand of wgmma, 32 bytes a row, from the place, strides and swizzle that its descriptor gives."""
        size = 4 if kind == "tf32" else 2
        start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        width, swizzle = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}[descriptor >> 62 & 3]
        row, k = np.meshgrid(np.arange(rows), np.arange(32 // size), indexing="ij")
        if transposed:  # rows lie side by side
            each = width // 2
            offset = row % each * 2 + k % 8 * width + k // 8 * stride + row // each * leading
        else:
            offset = k * size + row % 8 * width + row // 8 * stride
        address = start + offset
        address ^= (address >> 7 & swizzle) << 4
        places = [address + i for i in range(size)]
        for warp in range(first_warp, first_warp + 4):
            self.note_read(np.concatenate(places, axis=None), warp, by_wgmma=True)
        return decode(sum(self.shared[at].astype(np.uint64) << np.uint64(8 * i) for i, at in enumerate(places)), kind)


def launch(compiled: Any, bound: dict[str, Any], grid: Sequence[int], change: Callable[[str], str] = str) -> list[str]:
    """Run all programs of a launch on CPU tensors and return the hazards of the first that has any.

    Args:
        compiled: what Triton made of the kernel.
        bound: its arguments by name.
        change: applied to the PTX first.
    """
    parameters, memory = [], {}
    for name, kind in compiled.src.signature.items():
        value = bound.get(name)
        if kind == "constexpr":
            continue
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            buffer = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
            memory[storage.data_ptr()] = np.ctypeslib.as_array(buffer)
            parameters.append(value.data_ptr())
        else:
            parameters.append(int(value))
    parameters += [0] * 4  # Triton's own scratch memory, which these kernels do not use
    kernel = Kernel(change(compiled.asm["ptx"]), WARP * compiled.metadata.num_warps)
    whole = (*grid, 1, 1)[:3]
    for program in np.ndindex(*whole):
        hazards = kernel.run(parameters, program, whole, memory)
        if hazards:
            return [f"{compiled.src.name} {program}: {hazard}" for hazard in dict.fromkeys(hazards)]
    return []
