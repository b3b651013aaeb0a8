// Every function of csrc/cuda/ptx.cuh in a kernel of its own, for tests/test_cuda_ptx.py: one warp, registers in and
// out through global memory, so that the documented fragment layouts can be compared with the hardware's.
//
// Register arrays are laid out [lane][register]. The functions return a cudaError_t after synchronising.
#include <cstdint>

#include "../csrc/cuda/ptx.cuh"

namespace ptx = conv1x1::cuda::ptx;

namespace {

constexpr int kLanes = 32;

// 32 rows of 8 16-bit elements: matrix j is rows 8j to 8j+7, and lane l points to row l.
__global__ void ldmatrix(const uint16_t* in, uint32_t* out, bool trans) {
  __shared__ __align__(16) uint16_t rows[kLanes * 8];
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) rows[lane * 8 + i] = in[lane * 8 + i];
  __syncwarp();
  uint32_t r[4];
  if (trans)
    ptx::ldmatrix_x4_trans(r, rows + lane * 8);
  else
    ptx::ldmatrix_x4(r, rows + lane * 8);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = r[i];
}

enum class Product : int { kFloat16, kBFloat16, kTF32 };

__global__ void mma(const uint32_t* a_in, const uint32_t* b_in, float* d_inout, Product product) {
  const int lane = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = a_in[lane * 4 + i];
  for (int i = 0; i < 2; ++i) b[i] = b_in[lane * 2 + i];
  for (int i = 0; i < 4; ++i) d[i] = d_inout[lane * 4 + i];
  if (product == Product::kFloat16)
    ptx::mma_m16n8k16(d, a, b, __half());
  else if (product == Product::kBFloat16)
    ptx::mma_m16n8k16(d, a, b, __nv_bfloat16());
  else
    ptx::mma_m16n8k8_tf32(d, a, b);
  for (int i = 0; i < 4; ++i) d_inout[lane * 4 + i] = d[i];
}

// Lane l copies chunk l where valid[l], else zeros. Two groups, the even lanes' chunks in the second.
template <int kBytes>
__global__ void cp_async(const uint8_t* in, const int* valid, uint8_t* out) {
  __shared__ __align__(16) uint8_t chunks[kLanes * kBytes];
  const int lane = threadIdx.x;
  for (int i = 0; i < kBytes; ++i) chunks[lane * kBytes + i] = 0xff;
  __syncwarp();
  if (lane % 2 == 1) ptx::cp_async<kBytes>(chunks + lane * kBytes, in + lane * kBytes, valid[lane] != 0);
  ptx::cp_async_commit();
  if (lane % 2 == 0) ptx::cp_async<kBytes>(chunks + lane * kBytes, in + lane * kBytes, valid[lane] != 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncwarp();
  // The first group has arrived; the second may have.
  if (lane % 2 == 0)
    for (int i = 0; i < kBytes; ++i) out[(lane + 1) * kBytes + i] = chunks[(lane + 1) * kBytes + i];
  ptx::cp_async_wait<0>();
  __syncwarp();
  if (lane % 2 == 1)
    for (int i = 0; i < kBytes; ++i) out[(lane - 1) * kBytes + i] = chunks[(lane - 1) * kBytes + i];
}

__global__ void round_to_tf32(const uint32_t* in, uint32_t* out, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = ptx::round_to_tf32(in[i]);
}

// Of pairs of floats: rounded to 16 bits; the lanes of `y` that pass a mask; and x in [0, 6].
template <class T>
__global__ void halves(const float* x, const uint32_t* y, const uint32_t* upper, uint32_t* packed, uint32_t* passing,
                       float* in_range, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    packed[i] = ptx::pack(x[2 * i], x[2 * i + 1], T());
    passing[i] = ptx::passing(y[i], upper[i], T());
    in_range[i] = ptx::in_range(x[2 * i], 0.0f, 6.0f);
  }
}

int finish() {
  const cudaError_t launched = cudaGetLastError();
  return static_cast<int>(launched == cudaSuccess ? cudaDeviceSynchronize() : launched);
}

}  // namespace

extern "C" int run_ldmatrix(const uint16_t* in, uint32_t* out, int trans) {
  ldmatrix<<<1, kLanes>>>(in, out, trans != 0);
  return finish();
}

extern "C" int run_mma(const uint32_t* a, const uint32_t* b, float* d, int product) {
  mma<<<1, kLanes>>>(a, b, d, static_cast<Product>(product));
  return finish();
}

extern "C" int run_cp_async(const uint8_t* in, const int* valid, uint8_t* out, int bytes) {
  if (bytes == 4)
    cp_async<4><<<1, kLanes>>>(in, valid, out);
  else if (bytes == 8)
    cp_async<8><<<1, kLanes>>>(in, valid, out);
  else
    cp_async<16><<<1, kLanes>>>(in, valid, out);
  return finish();
}

extern "C" int run_round_to_tf32(const uint32_t* in, uint32_t* out, int count) {
  round_to_tf32<<<1, 256>>>(in, out, count);
  return finish();
}

extern "C" int run_halves(const float* x, const uint32_t* y, const uint32_t* upper, uint32_t* packed, uint32_t* passing,
                          float* in_range, int count, int bfloat16) {
  if (bfloat16)
    halves<__nv_bfloat16><<<1, 256>>>(x, y, upper, packed, passing, in_range, count);
  else
    halves<__half><<<1, 256>>>(x, y, upper, packed, passing, in_range, count);
  return finish();
}
