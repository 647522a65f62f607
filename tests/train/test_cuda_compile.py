"""The shipped CUDA text compiles for three architectures to machine code that keeps its promises; no GPU needed.

Read from the compilers' own report and from the machine code: nothing spilled, registers and shared memory, every logit
loaded and stored once, a ceiling on instructions per logit. Mutants show that each of these gates can fail.
"""

import functools
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.cuda_kernel_ladder.device_code import (
    Compiled,
    CompileError,
    Listing,
    ToolMissing,
    compile_with_nvcc,
    disassemble,
    ptx_of,
    read_listing,
    read_resources,
)
from benchmarks.cuda_kernel_ladder.product import (
    ARCHITECTURES,
    COMPILERS,
    DTYPES,
    KERNEL_FILE,
    PASSES,
    ROW_NAME,
    SHAPES,
    entry_names,
    instructions_per_logit,
    logit_bytes,
    table_lines,
)
from benchmarks.cuda_kernel_ladder.sass_count import UnknownFlow, find_loops, longest_path

README = KERNEL_FILE.parent / "README.md"
TEXT = KERNEL_FILE.read_text(encoding="ascii")
LOWEST_VIRTUAL = "compute_80"  # cvt.rn.bf16x2 is the first instruction that older devices lack
MAX_REGISTERS = 64  # 65,536 of a multiprocessor over the 1,024 threads that share it
MAX_SHARED_BYTES = 256  # two floats per warp of 32 warps
# Instructions per logit, by vectors per thread: the highest of both compilers and three architectures, and 6 % more.
CEILINGS = {
    "bf16": {1: 50.5, 2: 30.0, 4: 21.5, 8: 17.4},
    "fp16": {1: 50.5, 2: 30.0, 4: 21.5, 8: 17.4},
    "fp32": {1: 87.0, 2: 46.0, 4: 28.5, 8: 19.8},
}
LOOP_CEILINGS = {"stream": 13.0, "scale": 4.0}
BUILDS = [(compiler, arch) for compiler in sorted(COMPILERS) for arch in ARCHITECTURES]
each_build = pytest.mark.parametrize(("compiler", "arch"), BUILDS)


# -------------------------------------------------------------------------------------------------------------- builds
def build(compiler: str, arch: str, text: str = TEXT) -> tuple[Compiled, dict[str, Listing]] | ToolMissing:
    try:
        compiled = COMPILERS[compiler](text, arch)
        return compiled, disassemble(compiled.cubin)
    except ToolMissing as error:
        return error


@functools.cache
def all_builds() -> dict:
    """Every compiler and architecture once per session, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(BUILDS, pool.map(lambda one: build(*one), BUILDS), strict=True))


def built(compiler: str, arch: str) -> tuple[Compiled, dict[str, Listing]]:
    result = all_builds()[compiler, arch]
    if isinstance(result, ToolMissing):
        pytest.skip(str(result))
    return result


def only(text: str, kernel: str) -> str:
    """The text without the other kernels' entry points: a mutant compiles in a fraction of a second."""
    dtype, shape = re.fullmatch(r"(?:row_)?(\w+?)_(\w+)", kernel).groups()
    threads, _, vectors = shape.partition("x")
    kept = f"ROW_KERNEL({dtype}, {dtype.capitalize()}, {threads}, {vectors})"
    lines = [
        line
        for line in text.splitlines()
        if not re.match(r"(ROW_KERNEL|STREAM_AND_SCALE_KERNELS)\(", line) or line == kept
    ]
    assert kept in lines, f"{KERNEL_FILE.name} has no line {kept}"
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------------------- gates
def faults(compiled: Compiled, listings: dict[str, Listing], names: list[str]) -> list[str]:
    """What is wrong with the machine code; one text per fault."""
    found = []
    if set(compiled.resources) != set(names) or set(listings) != set(names):
        found.append(f"functions {sorted(set(compiled.resources) ^ set(names))}: missing or not inlined")
    for name in sorted(set(names) & set(listings)):
        resources = compiled.resources[name]
        if resources.spill_bytes or resources.stack_bytes:
            found.append(f"{name} spills: {resources}")
        if resources.registers > MAX_REGISTERS:
            found.append(f"{name} registers: {resources.registers}, expected at most {MAX_REGISTERS}")
        if resources.shared_bytes > MAX_SHARED_BYTES:
            found.append(f"{name} shared: {resources.shared_bytes} bytes, expected at most {MAX_SHARED_BYTES}")
        local = [one.opcode for one in listings[name].instructions if one.name in ("LDL", "STL")]
        if local:
            found.append(f"{name} local memory: {len(local)} instructions {local[0]} ...")
        found += faults_of_path(name, listings[name])
    return found


def faults_of_path(name: str, listing: Listing) -> list[str]:
    """Instructions per logit, and (row kernels) whether the logits pass once each way by 16 bytes."""
    row = ROW_NAME.fullmatch(name)
    try:
        count = instructions_per_logit(name, listing)
        path = longest_path(listing) if row else None
    except UnknownFlow as error:
        return [f"{name} flow: {error}"]
    dtype = next(dtype for dtype in DTYPES if f"_{dtype}" in name)
    ceiling = CEILINGS[dtype][int(row["vectors"])] if row else LOOP_CEILINGS[name.split("_")[1]]
    found = [f"{name} instructions: {count:.1f} per logit, expected at most {ceiling}"] if count > ceiling else []
    if row:
        vectors = int(row["vectors"])
        if path.loads[16] != vectors or path.stores[16] != vectors:
            found.append(
                f"{name} traffic: {path.loads[16]} loads and {path.stores[16]} stores of 16 bytes, "
                f"expected {vectors} of each"
            )
        if path.exponentials < 2 * vectors * 16 // logit_bytes(name):  # the sum's and the gradient's
            found.append(f"{name} path: {path.exponentials} exponentials, the counted way is not a row's")
    return found


@each_build
def test_machine_code_keeps_its_promises(compiler, arch):
    assert not faults(*built(compiler, arch), entry_names())


@each_build
def test_loops_of_streaming_kernels_move_whole_vectors(compiler, arch):
    """Two passes of the stream kernels and one of the scale kernels have a loop that loads by 16 bytes."""
    _, listings = built(compiler, arch)
    for kind, n_passes in PASSES.items():
        for dtype in DTYPES:
            loops = [loop for loop in find_loops(listings[f"wce_{kind}_{dtype}"]) if loop.loads[16]]
            kinds = {(loop.exponentials > 0, loop.stores[16] > 0) for loop in loops}
            assert len(kinds) == n_passes
            assert all(loop.stores[16] in (0, loop.loads[16]) for loop in loops)


# --------------------------------------------------------------------------------------------------------- text and PTX
def test_text_stands_alone():
    """NVRTC has no include path; doubles run at 1/64 of the speed on some devices."""
    assert "#include" not in TEXT.replace("no #include", "")
    assert max(map(len, TEXT.splitlines())) <= 120
    code = re.sub(r"//.*", "", TEXT)
    assert not re.search(r"\bdouble\b|\bprintf\b|\batomicAdd\b|\b\d+\.\d*(?![\df.]|e)", code)


@functools.cache
def ptx() -> str:
    try:
        return ptx_of(TEXT, LOWEST_VIRTUAL)
    except ToolMissing as error:
        pytest.skip(str(error))


def test_ptx_of_the_lowest_architecture():
    """What a device newer than the compiler gets: the driver makes machine code of it."""
    text = ptx()
    assert sorted(re.findall(r"\.visible \.entry (\w+)\(", text)) == sorted(entry_names())
    assert ".target sm_80" in text
    for word in (".f64", ".local", "call", "atom.global.add", "red.global.add", ".extern"):
        assert word not in re.sub(r"//.*", "", text), word


@pytest.mark.parametrize("name", entry_names())
def test_parameters_in_the_ptx(name):
    """The launch passes bare 4- and 8-byte values: order and widths are the contract of train/cuda/csrc/README.md."""
    signature = re.search(rf"\.visible \.entry {name}\((.*?)\)", ptx(), re.DOTALL)[1]
    widths = re.findall(r"\.param \.[ubs](\d+)", signature)
    expected = ["64", "64", "64"] if "scale" in name else [*["64"] * 4, "32", *["64"] * 6]
    assert widths == expected


def test_refusal_of_the_compiler_is_an_error_with_its_log():
    try:
        with pytest.raises(CompileError, match="compute_50: .*gpu-architecture"):
            ptx_of(TEXT, "compute_50")
    except ToolMissing as error:
        pytest.skip(str(error))


def test_nvcc_that_does_not_know_an_architecture_counts_as_missing():
    with pytest.raises(ToolMissing, match="nvcc"):
        compile_with_nvcc(TEXT, "sm_35")


# -------------------------------------------------------------------------------------------------------------- mutants
MUTANTS = {  # what is changed -> (kernel, pattern, replacement, words of faults that must be reported)
    "registers halved": (
        "row_bf16_512x8",
        r"void __launch_bounds__\(threads, 1024 / threads\)",
        "void __launch_bounds__(threads, 2048 / threads)",
        "spills, local memory",
    ),
    "gradient in a loop": (
        "row_bf16_512x8",
        r"(// 4\. Gradient.*?)#pragma unroll\n(\s+for \(int k = 0; k < VECTORS)",
        r"\1#pragma unroll 1" + "\n" + r"\2",
        "flow",
    ),
    "row read again for the gradient": (
        "row_bf16_512x8",
        r"(// 4\. Gradient.*?const int index = [^\n]*\n)",
        r"\1 if (index < n_vectors) vectors[k] = load_vector(row.logits, index);" + "\n",
        "traffic",
    ),
    "vectors loaded by halves": (
        "row_bf16_512x8",
        r"return reinterpret_cast<const Vector\*>\(start\)\[index\];",
        "const uint2* half = (const uint2*)start + 2 * index; return {{half->x, half->y, half[1].x, half[1].y}};",
        "16 bytes",
    ),
    "exact instead of approximate exponential": (
        "row_fp32_1024x8",
        r'asm\("ex2\.approx\.ftz\.f32[^\n]*',
        "result = exp2f(x);",
        "instructions",
    ),
    "division per logit": (
        "row_bf16_512x8",
        r"values\[j\] = scale \* (exp2_approximate\(score_of\(values\[j\], shift\)\))",
        r"values[j] = row.weight * \1 / sum",
        "instructions",
    ),
    "a whole row in shared memory": ("row_bf16_128x1", r"(float, warp_sums, THREADS) / 32", r"\1 * 8", "shared"),
    "function that is not inlined": (
        "row_bf16_128x1",
        r"__forceinline__ (void finish_row)",
        r"__noinline__ \1",
        "inlined",
    ),
}


def test_unchanged_text_passes_alone():
    """Else a mutant could be caught for the cut that `only` makes."""
    for kernel in sorted({mutant[0] for mutant in MUTANTS.values()}):
        result = build("nvrtc", "sm_90", only(TEXT, kernel))
        if isinstance(result, ToolMissing):
            pytest.skip(str(result))
        assert not faults(*result, [f"wce_{kernel}"])


@pytest.mark.parametrize("change", MUTANTS)
def test_mutant_is_caught(change):
    kernel, pattern, replacement, words = MUTANTS[change]
    text = only(TEXT, kernel)
    mutated, count = re.subn(pattern, replacement, text, count=1, flags=re.DOTALL)
    assert count == 1, f"the text to change is gone: {pattern}"
    result = build("nvrtc", "sm_90", mutated)
    if isinstance(result, ToolMissing):
        pytest.skip(str(result))
    found = faults(*result, [f"wce_{kernel}"])
    for word in words.split(", "):
        assert any(word in fault for fault in found), found


# ----------------------------------------------------------------------------------------- the page, and the counter
def test_figures_in_the_readme():
    text = README.read_text(encoding="ascii")
    compiler = re.search(r"instructions per logit; (NVRTC [\d.]+)", text)[1]
    results = {arch: built("nvrtc", arch) for arch in ARCHITECTURES}
    compiled, listings = ({arch: one[part] for arch, one in results.items()} for part in (0, 1))
    found = compiled[ARCHITECTURES[0]].compiler
    if found != compiler:
        pytest.skip(f"the page's figures are {compiler}'s, here is {found}")
    lines = table_lines(compiled, listings)
    missing = [line for line in lines if line not in text.splitlines()]
    assert not missing, "train/cuda/csrc/README.md must have these lines:\n" + "\n".join(lines)


def test_shapes_are_those_of_the_text():
    table = re.findall(r"^//\s+wce_row_<dtype>_(\d+x\d+)", TEXT, re.MULTILINE)
    assert tuple(table) == SHAPES


def test_report_of_ptxas_by_hand():
    log = """
ptxas info    : Function properties for a
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem, 400 bytes cmem[0]
ptxas info    : Function properties for b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers, used 0 barriers
"""
    found = read_resources(log)
    assert [(one.registers, one.spill_bytes, one.stack_bytes, one.shared_bytes) for one in found.values()] == [
        (40, 16, 8, 128),
        (7, 0, 0, 0),
    ]


HAND_LISTING = """
\t.section\t.text.toy,"ax",@progbits
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_2) ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_1:
        /*0030*/                   LDG.E.U16 R6, desc[UR4][R2.64] ;
        /*0040*/                   MUFU.EX2 R7, R6 ;
        /*0050*/               @P1 BRA `(.L_3) ;
        /*0060*/                   FADD R8, R8, R7 ;
.L_3:
        /*0070*/                   STG.E.U16 desc[UR4][R2.64], R7 ;
        /*0080*/               @P2 BRA `(.L_1) ;
        /*0090*/                   EXIT ;
.L_2:
        /*00a0*/                   STG.E desc[UR4][R2.64], R7 ;
        /*00b0*/                   EXIT ;
.L_4:
        /*00c0*/                   BRA `(.L_4);
        /*00d0*/                   NOP;
"""


def test_paths_by_hand():
    """One loop: once round it are 0x30 to 0x80 with the FADD, 6 instructions, 2 bytes in, 2 out, 1 exponential."""
    listing = read_listing(HAND_LISTING)["toy"]
    assert len(listing.instructions) == 13
    (loop,) = find_loops(listing)
    assert (loop.instructions, loop.exponentials, loop.loads, loop.stores) == (6, 1, {2: 1}, {2: 1})
    with pytest.raises(UnknownFlow, match="0x30 handles logits"):
        longest_path(listing)
    # Without the jump back: 0x00, 0x10, 0x20, the six, EXIT; the other way stores before any exponential.
    straight = read_listing(HAND_LISTING.replace("@P2 BRA `(.L_1)", "NOP"))["toy"]
    path = longest_path(straight)
    assert (path.instructions, path.exponentials, path.loads, path.stores) == (10, 1, {16: 1, 2: 1}, {2: 1})


def test_unknown_control_flow_is_an_error():
    listing = read_listing(HAND_LISTING.replace("FADD R8, R8, R7", "BRX R8"))["toy"]
    with pytest.raises(UnknownFlow, match="BRX at 0x60"):
        find_loops(listing)


def test_page_says_that_nothing_ran_on_a_gpu():
    assert "No kernel here has been run on a GPU by us" in README.read_text(encoding="ascii")
