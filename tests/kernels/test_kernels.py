"""GPU kernels without a GPU: the CUDA source on emulated warps, the Triton one in its interpreter, against float64.

What runs on a CUDA device as well is marked `cuda`.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from support.products import close, two_of_four
from torch import Tensor

from secateur.errors import BadCheckpoint, BadPattern, NonFinite
from secateur.kernels import bitmap
from secateur.kernels import packed as on_cpu
from secateur.kernels import two_of_four as nm
from secateur.kernels.packed import Packed
from secateur.methods import METHODS
from secateur.methods.pattern_text import parse_pattern
from secateur.methods.statistics import Stats

DTYPES = [torch.float16, torch.bfloat16]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

# C++ for what CUDA has beyond it. The threads of a block are fibers that change at barriers, and a warp goes on until
# it has to wait for another one; copies to shared memory arrive only when they are waited for, and must begin at
# multiples of 16 bytes inside of the values. Without any one of its barriers the kernel fails these tests.
SHIM = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <ucontext.h>
#include <vector>
#define EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __align__(bytes) alignas(bytes)
#define __shared__ static
#define __popc __builtin_popcount
static int min(int a, int b) { return a < b ? a : b; }
enum { THREADS = 128, LANES = 32 };
struct Index { int x; };
struct Barrier { int arrived = 0, turn = 0; };
struct Copy { char *to; const char *from; };
static Index threadIdx, blockIdx;
static ucontext_t fibers[THREADS], scheduler;
static bool finished[THREADS], waits[THREADS];
static std::vector<Copy> copies[THREADS];
static Barrier block_barrier, warp_barriers[THREADS / LANES];
static unsigned exchanged[THREADS][6];
static const char *first_value, *last_value;
static int faults;
static char anchor[16];

static void yield() { int me = threadIdx.x; swapcontext(&fibers[me], &scheduler); threadIdx.x = me; }
static void meet(Barrier &barrier, int threads) {
    int turn = barrier.turn;
    if (++barrier.arrived == threads) { barrier.arrived = 0; barrier.turn++; }
    else while (barrier.turn == turn) yield();
}
static void __syncthreads() {
    waits[threadIdx.x] = true;
    if (block_barrier.arrived == THREADS - 1) memset(waits, 0, sizeof waits);
    meet(block_barrier, THREADS);
}
static void __syncwarp() { meet(warp_barriers[threadIdx.x / LANES], LANES); }
static unsigned from_lane(unsigned value, int lane) {
    int warp = threadIdx.x / LANES * LANES;
    exchanged[threadIdx.x][0] = value;
    __syncwarp();
    unsigned got = exchanged[warp + lane][0];
    __syncwarp();
    return got;
}
static unsigned __shfl_sync(unsigned, unsigned value, int lane) { return from_lane(value, lane); }
static unsigned __shfl_up_sync(unsigned, unsigned value, int by) {
    int lane = threadIdx.x % LANES;
    return from_lane(value, lane < by ? lane : lane - by);
}
static unsigned shared_place(const unsigned short *at) { return (unsigned)((intptr_t)at - (intptr_t)anchor); }
static char *shared_at(unsigned place) { return anchor + (int)place; }
static unsigned next_value(unsigned condition, unsigned *place) {
    if (!condition) return 0;
    unsigned short value;
    memcpy(&value, shared_at(*place), 2);
    *place += 2;
    return value;
}
static unsigned short rounded(float value, bool bfloat) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    if (bfloat) return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    int exponent, sign = bits >> 31 << 15; /* eleven bits of a number, fewer of one below 2^-14 */
    std::frexp(value, &exponent);
    exponent = exponent < -13 ? -13 : exponent;
    int mantissa = (int)std::nearbyint(std::ldexp(std::fabs(value), 11 - exponent));
    return sign + (mantissa ? (exponent + 13) * 1024 + mantissa : 0);
}
static void copy_unit(unsigned to, const unsigned short *from) {
    Copy copy = {shared_at(to), (const char *)from};
    bool sound = (intptr_t)copy.to % 16 == 0 && (intptr_t)copy.from % 16 == 0;
    if (!sound || copy.from < first_value || copy.from + 16 > last_value) faults++;
    else copies[threadIdx.x].push_back(copy);
}
static void wait_for_copies() {
    for (Copy copy : copies[threadIdx.x]) memcpy(copy.to, copy.from, 16);
    copies[threadIdx.x].clear();
}
static float number(unsigned bits, bool bfloat) {
    float value;
    unsigned wide = bits << 16;
    if (bfloat) { memcpy(&value, &wide, 4); return value; }
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    value = exponent ? std::ldexp((float)(mantissa + 1024), exponent - 25) : std::ldexp((float)mantissa, -24);
    return bits & 0x8000 ? -value : value;
}
/* Entry (row, k) of A or (k, column) of B as the instruction wants them: lane 4 i + k % 8 / 2, low for k < 8. */
static float entry(int i, int k, int low, int high, bool bfloat) {
    int lane = threadIdx.x / LANES * LANES + 4 * i + k % 8 / 2;
    unsigned two = exchanged[lane][k < 8 ? low : high];
    return number(k % 2 ? two >> 16 : two & 0xffff, bfloat);
}
template <bool BFLOAT, class Four> static void add_products(float *sum, Four first, Four second, Four x) {
    unsigned mine[6] = {first.low, first.high, second.low, second.high, x.low, x.high};
    memcpy(exchanged[threadIdx.x], mine, sizeof mine);
    __syncwarp();
    int row = threadIdx.x % LANES / 4, column = 2 * (threadIdx.x % 4);
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++)
            sum[i] += entry(row, k, 2 * (i / 2), 2 * (i / 2) + 1, BFLOAT) * entry(column + i % 2, k, 4, 5, BFLOAT);
    __syncwarp();
}
#include SOURCE

static std::function<void()> kernel;
static void *shared_memory;
static void fiber() { kernel(); finished[threadIdx.x] = true; }
static void run_block() {
    static std::vector<std::unique_ptr<char[]>> stacks;
    enum { STACK = 1 << 16 };
    while (stacks.size() < THREADS) stacks.emplace_back(new char[STACK]);
    for (int i = 0; i < THREADS; i++) {
        getcontext(&fibers[i]);
        fibers[i].uc_stack.ss_sp = stacks[i].get();
        fibers[i].uc_stack.ss_size = STACK;
        fibers[i].uc_link = &scheduler;
        finished[i] = false;
        makecontext(&fibers[i], fiber, 0);
    }
    for (bool left = true; left;) {
        left = false;
        for (int warp = 0; warp < THREADS; warp += LANES)
            for (bool goes_on = true; goes_on; left |= goes_on) {
                goes_on = false;
                for (int i = warp; i < warp + LANES; i++)
                    if (!finished[i] && !waits[i]) {
                        goes_on = true;
                        threadIdx.x = i;
                        swapcontext(&scheduler, &fibers[i]);
                    }
            }
    }
}
#define CASE(BATCH) \
    if (batch == BATCH) kernel = [=] { \
        if (bfloat) multiply<BATCH, true>(bitmap, values, starts, x, y, rows, words, stride, narrow); \
        else multiply<BATCH, false>(bitmap, values, starts, x, y, rows, words, stride, narrow); };
extern "C" int run(int batch, int bfloat, const unsigned *bitmap, const unsigned short *values, const long long *starts,
                   const unsigned short *x, void *y, int rows, int words, int stride, int narrow,
                   long long values_bytes) {
    first_value = (const char *)values, last_value = first_value + values_bytes, faults = 0;
    CASE(1) CASE(2) CASE(3) CASE(8)
    for (blockIdx.x = 0; blockIdx.x * ROWS < rows; blockIdx.x++) run_block();
    return faults;
}
"""
INSTANCES = "\n".join(
    f"template __global__ void multiply<{batch}, {bfloat}>(const unsigned *, const unsigned short *, "
    "const long long *, const unsigned short *, void *, int, int, int, int);"
    for batch, bfloat in ((1, "true"), (1, "false"), (8, "true"))
)


def sparse(rows: int, columns: int, sparsity: float, dtype: torch.dtype) -> Tensor:
    """A random matrix, with a full row and an empty one where there are several."""
    draw = torch.Generator().manual_seed(rows + columns)
    kept = torch.rand(rows, columns, generator=draw) >= sparsity
    if 0 < sparsity < 1 and rows > 2:
        kept[1], kept[2] = True, False
    return (torch.randn(rows, columns, generator=draw) * kept).to(dtype)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA source, compiled for this processor."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("there is no g++ to compile the emulation with")
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "shim.cpp").write_text(SHIM)
    options = ["-O1", "-std=c++17", "-shared", "-fPIC", f'-DSOURCE="{bitmap.SOURCE}"']
    subprocess.run([compiler, *options, "-o", folder / "shim.so", folder / "shim.cpp"], check=True)
    loaded = ctypes.CDLL(str(folder / "shim.so"))
    loaded.run.argtypes = [*[ctypes.c_int] * 2, *[ctypes.c_void_p] * 5, *[ctypes.c_int] * 4, ctypes.c_longlong]
    return loaded


def emulate(emulated: ctypes.CDLL, packed: Packed, x: Tensor, *, narrow: bool = False) -> Tensor:
    """What `bitmap.multiply` does on a GPU, float32 or as the values."""
    width = -(-packed.columns // bitmap.STEP) * bitmap.STEP
    x = torch.nn.functional.pad(x, (0, width - packed.columns)).contiguous()
    y = torch.full((len(x), packed.rows), float("nan"), dtype=packed.values.dtype if narrow else torch.float32)
    tensors = (packed.bitmap, packed.values, packed.starts, x, y)
    faults = emulated.run(
        len(x), packed.values.dtype == torch.bfloat16, *(t.data_ptr() for t in tensors), packed.rows,
        2 * packed.bitmap.shape[1], width, narrow, 2 * len(packed.values),
    )  # fmt: skip
    assert not faults, "copies out of bounds or at odd places"
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 200), (4, 1024), (3, 8300), (1, 1), (9, 65)])
def test_emulated_bitmap_products_equal_float64(emulated, shape, dtype):
    rows, columns = shape
    for sparsity in (0.0, 0.5, 0.9, 1.0):
        weight = sparse(rows, columns, sparsity, dtype)
        held = bitmap.pack(weight, name="w", device="cpu")
        for batch in (1, 2, 8) if sparsity == 0.5 else (3,):
            x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch)).to(dtype)
            got = emulate(emulated, held, x)
            assert close(got, weight, x)
            assert torch.equal(emulate(emulated, held, x, narrow=True), got.to(dtype))


def test_the_emulation_sees_what_is_wrong(emulated):
    held = bitmap.pack(sparse(4, 1024, 0.5, torch.bfloat16), name="w", device="cpu")
    x = torch.randn(1, 1024).bfloat16()
    moved = torch.cat([held.values[:1], held.values])[1:]
    with pytest.raises(AssertionError, match="odd places"):
        emulate(emulated, Packed(held.bitmap, moved, held.starts, held.columns), x)
    cut = held.values[:-48].clone()
    with pytest.raises(AssertionError, match="out of bounds"):
        emulate(emulated, Packed(held.bitmap, cut, held.starts, held.columns), x)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_bitmap_compiles_for_devices(tmp_path, architecture):
    if (compiler := shutil.which("nvcc")) is None:
        pytest.skip("there is no nvcc")
    source = tmp_path / "instances.cu"
    source.write_text(f'#include "{bitmap.SOURCE}"\n{INSTANCES}\n')
    command = [
        compiler,
        f"-arch={architecture}",
        "-cubin",
        "-Xptxas",
        "-v,--warn-on-spills",
        "-o",
        tmp_path / "out.cubin",
    ]
    done = subprocess.run([*command, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitmap_packing_loses_nothing(dtype):
    weight = sparse(7, 130, 0.5, dtype)
    weight[weight == 0] = -0.0
    held = bitmap.pack(weight, name="w", device="cpu")
    assert held.values.dtype == dtype
    assert torch.equal(bitmap.unpack(held).view(torch.int16), (weight + 0.0).view(torch.int16))
    if dtype == torch.bfloat16:
        assert torch.equal(held.values, on_cpu.pack(weight).values)


def test_what_bitmap_refuses():
    with pytest.raises(BadCheckpoint, match=r"layers\.0\.up is torch\.float32 \[4, 64\]; a matrix in float16"):
        bitmap.pack(torch.ones(4, 64), name="layers.0.up", device="cpu")
    weight = torch.ones(4, 64).half()
    weight[1, 2] = float("nan")
    with pytest.raises(NonFinite, match=r"layers\.0\.up holds NaN"):
        bitmap.pack(weight, name="layers.0.up", device="cpu")
    if not torch.cuda.is_available():
        assert bitmap.missing() == nm.missing() == "there is no CUDA device"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 24), (1030, 64)])
def test_two_of_four_packing_loses_nothing(shape, dtype):
    rows, columns = shape
    weight = two_of_four(rows, columns, dtype)
    assert (weight.view(torch.int16) == -(2**15)).any()
    held = nm.pack(weight, name="w", device="cpu")
    assert held.bytes == 9 * weight.numel() // 8
    assert torch.equal(nm.unpack(held).view(torch.int16), (weight + 0.0).view(torch.int16))


def test_every_group_of_two_is_stored():
    groups = torch.tensor([[float(bits >> j & 1) for j in range(4)] for bits in range(16)])
    weight = groups[groups.sum(1) <= 2].repeat(1, 2).half() * torch.arange(1.0, 9.0).half()
    assert torch.equal(nm.unpack(nm.pack(weight, name="w", device="cpu")), weight)


def test_what_two_of_four_refuses():
    with pytest.raises(BadCheckpoint, match=r"up is torch\.float32"):
        nm.pack(torch.ones(4, 64), name="up", device="cpu")
    with pytest.raises(BadPattern, match="up has 12 inputs; packed 2:4 matrices need a multiple of 8"):
        nm.pack(torch.zeros(4, 12).half(), name="up", device="cpu")
    weight = two_of_four(2000, 64, torch.bfloat16)
    weight[1999, 8:11], weight[1999, 11] = 1, 0
    with pytest.raises(
        BadPattern, match="up is not 2:4: inputs 8 to 11 of output 1999 keep 3 weights, two were wanted"
    ):
        nm.pack(weight, name="up", device="cpu")
    weight[1998, 3] = float("nan")
    with pytest.raises(NonFinite, match="up holds NaN"):
        nm.pack(weight, name="up", device="cpu")


def in_triton(code: str, *, interpret: bool) -> None:
    """Run code in a new process, where Triton is imported for the interpreter or not; skips where it is missing."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_interpreted_products_equal_float64():
    in_triton(
        """
import torch
from secateur.kernels import two_of_four as nm
from support.products import close, two_of_four
for dtype in (torch.float16, torch.bfloat16):
    for shape, batch, configuration in [
        ((5, 328), 1, None), ((3, 8), 3, nm.Configuration(2, 1)), ((4, 1056), 8, nm.Configuration(4, 4)),
        ((2, 264), 11, nm.Configuration(1, 8)),
    ]:
        weight = two_of_four(*shape, dtype)
        x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
        y = nm.multiply(nm.pack(weight, name="w", device="cpu"), x.float(), configuration=configuration)
        assert y.dtype == torch.float32 and close(y, weight, x), (shape, dtype)
        narrow = nm.multiply(nm.pack(weight, name="w", device="cpu"), x, configuration=configuration)
        # The interpreter cuts bfloat16 off, a device rounds it.
        assert narrow.dtype == dtype and torch.allclose(narrow.float(), y, rtol=2**-7, atol=0), (shape, dtype)
odd = torch.randn(329).bfloat16()[1:]
held = nm.pack(two_of_four(5, 328, torch.bfloat16), name="w", device="cpu")
assert torch.equal(nm.multiply(held, odd), nm.multiply(held, odd.clone()))
""",
        interpret=True,
    )


def test_the_triton_kernel_compiles_for_a_device():
    in_triton(
        """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from secateur.kernels.two_of_four_triton import multiply
names = ["values", "meta", "x", "y", "rows", "units"]
signature = dict(zip(names, ["*u64", "*u8", "*u64", "*fp32", "i32", "i32"], strict=True))
fixed = {"rows_at_once": 2, "batch": 2, "lanes": 128, "dtype": tl.bfloat16}
signature |= dict.fromkeys(fixed, "constexpr")
source = ASTSource(multiply, signature=signature, constexprs=fixed)
target = GPUTarget("cuda", 90, 32)
assert triton.compile(source, target=target, options={"num_warps": 4, "enable_fp_fusion": True}).asm["cubin"]
""",
        interpret=False,
    )


def test_interpreted_sweeps_equal_torch():
    in_triton(
        """
import torch
from secateur.kernels import sweep as on_gpu
from secateur.methods.patterns import NM, Unstructured
from secateur.methods.column_sweep import sweep_block_in_torch
from support.sweeping import block_of
for rows, width, pattern in [(5, 16, NM(2, 4)), (3, 21, NM(1, 3)), (4, 16, NM(5, 8)), (6, 13, None), (1, 1, None)]:
    values, inverse, alive = block_of(rows, width)
    values[:, :9] = values[:, :9].sign()
    kept = torch.rand(rows, width, generator=torch.Generator().manual_seed(1)) < 0.5
    wanted, found, given = values.clone(), values.clone(), None if pattern else kept.clone()
    expected = sweep_block_in_torch(wanted, inverse, alive, pattern or Unstructured(0.5), given)
    m, n = (pattern.m, pattern.n) if pattern else (width, 0)
    on_gpu.sweep_block(found, kept, inverse.T.contiguous().T, alive, m, n)
    assert torch.equal(kept, expected), (rows, width, pattern)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5), (rows, width, pattern)
    assert not found[~kept].signbit().any()
""",
        interpret=True,
    )


def test_the_sweep_kernel_compiles_for_a_device():
    in_triton(
        """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from secateur.kernels.sweep import ROWS_AT_ONCE, WARPS
from secateur.kernels.sweep_triton import sweep_rows
numbers = ["rows", "width", "row_stride", "column_stride", "m", "n"]
signature = {"values": "*fp32", "kept": "*u8", "inverse": "*fp32", "alive": "*fp32", **dict.fromkeys(numbers, "i32")}
for choose in (True, False):
    fixed = {"choose": choose, "rows_at_once": ROWS_AT_ONCE, "columns": 128}
    source = ASTSource(sweep_rows, signature=signature | dict.fromkeys(fixed, "constexpr"), constexprs=fixed)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
    assert made.asm["cubin"]
""",
        interpret=False,
    )


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("pattern", ["50%", "30% of row", "2:4", "1:3"])
def test_the_sweep_on_a_device_equals_the_one_on_the_processor(pattern):
    weight = torch.randn(1030, 504, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2000, 504, generator=torch.Generator().manual_seed(1))
    stats = Stats.of(x, {"gram"})
    chosen = parse_pattern(pattern).within("matrix")
    here = METHODS["sparsegpt"].prune(weight, stats, chosen)
    there = METHODS["sparsegpt"].prune(weight.cuda(), stats, chosen)
    assert (here.kept != there.kept.cpu()).float().mean() < 1e-4
    same = (here.kept == there.kept.cpu()).all(1)
    assert torch.allclose(here.weight[same], there.weight.cpu()[same], rtol=1e-3, atol=1e-4)


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (37, 200), (513, 4104), (1024, 4096)])
def test_products_on_a_device_equal_float64(shape, dtype):
    rows, columns = shape
    weight = two_of_four(rows, columns, dtype)
    if (reason := nm.missing() or bitmap.missing()) is not None:
        pytest.skip(reason)
    two, bits = nm.pack(weight, name="w"), bitmap.pack(weight, name="w")
    for batch in (*range(1, 9), 11):
        x = torch.randn(batch, columns).to(dtype)
        assert close(nm.multiply(two, x.float().cuda()).cpu(), weight, x)
        assert close(bitmap.multiply(bits, x.float().cuda()).cpu(), weight, x)
        for got in (nm.multiply(two, x.cuda()), bitmap.multiply(bits, x.cuda())):
            assert torch.allclose(got.cpu(), (x.float() @ weight.float().T).to(dtype), rtol=1e-2, atol=1e-2)
