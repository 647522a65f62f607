"""Instructions per logit, counted in a kernel's machine code by following its control flow.

A kernel that holds its row in registers is straight code: `longest_path` walks from the entry to the end over the way
with the most exponentials (a row with weight, a thread whose vectors all exist) and, among those, the most
instructions, so other rows and threads execute no more. Kernels that loop over the row: `find_loops` gives the longest
way once round every innermost loop, with its loads, stores and exponentials.
Counted are instructions issued for one thread, which is what a warp issues for 32. Left out: `BRA.DIV` (taken by a
warp whose lanes have parted; ours are together at every shuffle) and the bodies of called subroutines (the exact
division's way for denormal and infinite operands).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from benchmarks.cuda_kernel_ladder.device_code import Instruction, Listing

STRAIGHT_ON = {"CALL", "BREAK", "BSSY", "BSYNC", "BPT", "WARPSYNC", "YIELD", "NANOSLEEP"}
UNKNOWN = {"BRX", "BRXU", "JMP", "JMX", "JMXU", "BMOV", "KILL", "RTT", "RPCMOV"}


class UnknownFlow(Exception):
    """Control flow that this counter does not follow."""


@dataclass(slots=True, frozen=True)
class Path:
    """Instructions of one way through the code."""

    instructions: int
    exponentials: int
    loads: Counter  # bytes per thread and instruction -> instructions that load from device memory
    stores: Counter
    addresses: tuple[int, ...]

    def load_bytes(self) -> int:
        return sum(width * count for width, count in self.loads.items())

    def store_bytes(self) -> int:
        return sum(width * count for width, count in self.stores.items())


def access_bytes(instruction: Instruction) -> int:
    """Bytes that one thread moves: LDG.E.128 is 16, LDG.E.U16 2, no width in the name 4."""
    for part in instruction.opcode.split(".")[1:]:
        bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}.get(part)
        if bits:
            return bits // 8
    return 4


# -------------------------------------------------------------------------------------------------------- control flow
def successors(listing: Listing) -> dict[int, list[int]]:
    """Address -> addresses that may run next. Raises UnknownFlow."""
    following = {}
    for number, instruction in enumerate(listing.instructions):
        after = listing.instructions[number + 1].address if number + 1 < len(listing.instructions) else None
        straight = [] if after is None else [after]
        if instruction.name == "BRA":
            *conditions, label = instruction.operands.replace("`(", "").replace(")", "").split(",")
            is_conditional = instruction.is_guarded or bool(conditions)
            if instruction.opcode == "BRA.DIV":
                following[instruction.address] = straight
            else:
                following[instruction.address] = [listing.labels[label.strip()], *(straight if is_conditional else [])]
        elif instruction.name in ("EXIT", "RET"):
            following[instruction.address] = straight if instruction.is_guarded else []
        elif instruction.name in UNKNOWN:
            raise UnknownFlow(f"{instruction.opcode} at {instruction.address:#x}")
        else:
            following[instruction.address] = straight
    return following


def _order_and_back_edges(following: dict[int, list[int]], entry: int) -> tuple[list[int], set[tuple[int, int]]]:
    """Reachable addresses with every successor before its predecessor, and the edges that close a loop."""
    finished, on_way, back, order = set(), {entry}, set(), []
    stack = [(entry, iter(following[entry]))]
    while stack:
        address, rest = stack[-1]
        target = next(rest, None)
        if target is None:
            stack.pop()
            on_way.discard(address)
            finished.add(address)
            order.append(address)
        elif target in on_way:
            back.add((address, target))
        elif target not in finished:
            on_way.add(target)
            stack.append((target, iter(following[target])))
    return order, back


def _best_path(listing: Listing, entry: int, following: dict[int, list[int]], order: list[int]) -> Path:
    """The way from `entry` with the most exponentials, then the most instructions; `following` without loops."""
    by_address = {instruction.address: instruction for instruction in listing.instructions}
    best: dict[int, tuple[int, int, int | None]] = {}
    for address in order:
        exponentials, count, target = max(
            ((*best[target][:2], target) for target in following[address] if target in best), default=(0, 0, None)
        )
        is_exponential = by_address[address].opcode.startswith("MUFU.EX2")
        best[address] = (exponentials + is_exponential, count + 1, target)
    addresses, at = [], entry
    while at is not None:
        addresses.append(at)
        at = best[at][2]
    loads, stores = (
        Counter(access_bytes(by_address[at]) for at in addresses if by_address[at].name == name)
        for name in ("LDG", "STG")
    )
    return Path(len(addresses), best[entry][0], loads, stores, tuple(addresses))


def longest_path(listing: Listing) -> Path:
    """From the entry to the end, loops gone round once. Raises UnknownFlow if a loop on the way touches logits.

    A row with weight stores nothing before its first exponential, so ways through such a store (the zero gradient of
    the other rows) are left out. Without that rule they would count: both kinds of row meet again at one branch.
    """
    following, entry = successors(listing), listing.instructions[0].address
    order, back = _order_and_back_edges(following, entry)
    forward = {address: [t for t in targets if (address, t) not in back] for address, targets in following.items()}
    early_stores = _early_stores(listing, following)
    path = _best_path(listing, entry, forward, [address for address in order if address not in early_stores])
    on_path = set(path.addresses)
    for loop in find_loops(listing):
        if loop.addresses[0] in on_path and (loop.loads or loop.stores or loop.exponentials):
            raise UnknownFlow(f"a loop at {loop.addresses[0]:#x} handles logits: the kernel is not straight code")
    return path


def _early_stores(listing: Listing, following: dict[int, list[int]]) -> set[int]:
    """Stores to device memory that no exponential can have gone before."""
    waiting = [one.address for one in listing.instructions if one.opcode.startswith("MUFU.EX2")]
    late = set()
    while waiting:
        address = waiting.pop()
        if address not in late:
            late.add(address)
            waiting += following[address]
    return {one.address for one in listing.instructions if one.name == "STG" and one.address not in late}


def find_loops(listing: Listing) -> list[Path]:
    """The longest way once round every innermost loop, in order of address."""
    following, entry = successors(listing), listing.instructions[0].address
    order, back = _order_and_back_edges(following, entry)
    before: dict[int, list[int]] = {}
    for address in order:
        for target in following[address]:
            before.setdefault(target, []).append(address)
    bodies: dict[int, set[int]] = {}
    for end, head in back:
        body, waiting = bodies.setdefault(head, {head}), [end]
        while waiting:
            address = waiting.pop()
            if address not in body:
                body.add(address)
                waiting += before.get(address, [])
    loops = []
    for head, body in sorted(bodies.items()):
        if any(other != head and other in body for other in bodies):
            continue
        inside = {address: [t for t in following[address] if t in body and t != head] for address in body}
        loops.append(_best_path(listing, head, inside, [address for address in order if address in body]))
    return loops


# -------------------------------------------------------------------------------------------------------- per logit
def straight_count(listing: Listing, logit_bytes: int) -> float:
    """Instructions per logit of a kernel that loads its row into registers, by vectors of 16 bytes.

    Raises UnknownFlow where it does not.
    """
    path = longest_path(listing)
    if not path.loads[16]:
        raise UnknownFlow("nothing is loaded by 16 bytes")
    return path.instructions / (path.loads[16] * 16 / logit_bytes)


def looped_count(listing: Listing, logit_bytes: int, n_passes: int) -> float:
    """Instructions per logit of a kernel that goes over its row `n_passes` times.

    Of each pass (told apart by whether it computes exponentials and whether it stores) the loop that takes most logits
    at once counts: all but the first or last few logits go round there. Raises UnknownFlow where the passes are another
    number.
    """
    passes: dict[tuple[bool, bool], Path] = {}
    for loop in find_loops(listing):
        kind = loop.exponentials > 0, bool(loop.stores)
        if loop.loads and (kind not in passes or loop.load_bytes() > passes[kind].load_bytes()):
            passes[kind] = loop
    if len(passes) != n_passes:
        raise UnknownFlow(f"found {len(passes)} passes over the row, expected {n_passes}")
    return sum(loop.instructions * logit_bytes / loop.load_bytes() for loop in passes.values())
