// Packing, unpacking and the sums of panels: plain loops over convert.h's lines, for the including file's ISA.
// What each function does is said at its type in ../microkernel.h.
#pragma once

#include "lines.h"
#include "sums.h"

CONV1X1_KERNELS_BEGIN

// A rectangle of one source (and its mask source): element (r, k) at r * rs + k * ks.
template <class S>
struct Rect {
  const S* src;
  const S* aux;
  int64_t rs, ks, ars, aks, nr, nk;
};

template <class T, Mask M, class S>
inline T read(const S* p, const S* aux) {
  Lanes<S, 1> x;
  load_masked<M>(x, p, aux);
  S g;
  __builtin_memcpy(&g, &x, sizeof g);
  return load_as(g, T());
}

// d[j] = s[j] under the mask of x. Half types are masked as they are, then converted.
template <class T, Mask M, class S>
inline void copy_line(T* d, const S* s, const S* x, int64_t n) {
  if constexpr (M == Mask::kNone) {
    load_line(d, s, n);
  } else if constexpr (sizeof(S) == sizeof(T)) {
    mask_line<M>(d, s, x, n);
  } else {
    constexpr int64_t kPiece = 256;
    S passed[kPiece];
    for (int64_t j = 0; j < n; j += kPiece) {
      const int64_t piece = n - j < kPiece ? n - j : kPiece;
      mask_line<M>(passed, s + j, x + j, piece);
      load_line(d + j, passed, piece);
    }
  }
}

// dst[major * ld + minor] = the source, which is contiguous along the minor index.
template <class T, Mask M, class S>
void copy_lines(T* dst, int64_t ld, const S* src, const S* aux, int64_t major_stride, int64_t aux_major, int64_t majors,
                int64_t minors) {
  for (int64_t i = 0; i < majors; ++i)
    copy_line<T, M>(dst + i * ld, src + i * major_stride, M == Mask::kNone ? nullptr : aux + i * aux_major, minors);
}

// d[j] = s[2 * j]. Two loads that overlap by one element read nothing behind the last element.
template <class S>
inline void every_second(S* d, const S* s, int64_t n) {
  by_lanes<S>(n, [=](int64_t j, auto lanes) {
    constexpr int kLanes = lanes;
    Lanes<S, kLanes> low, high;
    load_lanes(low, s + 2 * j);
    load_lanes(high, s + 2 * j + (kLanes - 1));
    if constexpr (kLanes == 16)
      low = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31);
    else if constexpr (kLanes == 8)
      low = __builtin_shufflevector(low, high, 0, 2, 4, 6, 9, 11, 13, 15);
    else if constexpr (kLanes == 4)
      low = __builtin_shufflevector(low, high, 0, 2, 5, 7);
    __builtin_memcpy(d + j, &low, sizeof low);
  });
}

// dst[major * ld + minor] = every second element of the source, as with stride 2 along a row of pixels.
template <class T, Mask M, class S>
void copy_every_second(T* dst, int64_t ld, const S* src, const S* aux, int64_t major_stride, int64_t aux_major,
                       int64_t majors, int64_t minors) {
  constexpr int64_t kPiece = 64;
  S picked[kPiece], masked[kPiece];
  for (int64_t i = 0; i < majors; ++i) {
    if constexpr (M == Mask::kNone && std::is_same<T, S>::value) {
      every_second(dst + i * ld, src + i * major_stride, minors);
      continue;
    }
    for (int64_t j = 0; j < minors; j += kPiece) {
      const int64_t n = minors - j < kPiece ? minors - j : kPiece;
      every_second(picked, src + i * major_stride + 2 * j, n);
      if (M != Mask::kNone) every_second(masked, aux + i * aux_major + 2 * j, n);
      copy_line<T, M>(dst + i * ld + j, picked, masked, n);
    }
  }
}

// Copies lines of stride 1 or 2 by the functions above.
template <class T, Mask M, class S>
void copy_lines_of(int64_t stride, T* dst, int64_t ld, const S* src, const S* aux, int64_t major_stride,
                   int64_t aux_major, int64_t majors, int64_t minors) {
  const auto copy = stride == 1 ? copy_lines<T, M, S> : copy_every_second<T, M, S>;
  copy(dst, ld, src, aux, major_stride, aux_major, majors, minors);
}

template <class T, Mask M, class S>
void copy_strided(T* dst, int64_t dst_r, int64_t dst_k, const Rect<S>& q) {
  for (int64_t k = 0; k < q.nk; ++k)
    for (int64_t r = 0; r < q.nr; ++r) {
      const S* aux = M == Mask::kNone ? q.src : q.aux + r * q.ars + k * q.aks;
      dst[r * dst_r + k * dst_k] = read<T, M>(q.src + r * q.rs + k * q.ks, aux);
    }
}

// dst[k * ld + r] = the k-th T of row r of src, in squares of 4 x 4 (16 x 16 with CONV1X1_HAS_AVX512). It takes a chunk
// of k at a time: several passes over r fill each line of dst, and the lines stay in L1 meanwhile. Rows are `pitch`
// bytes apart; rows of pairs need not be aligned.
template <class T>
void transpose(T* dst, int64_t ld, const void* src, int64_t pitch, int64_t nr, int64_t nk) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T))));
  constexpr int64_t kChunk = 32, kSize = sizeof(T);
  for (int64_t k0 = 0; k0 < nk; k0 += kChunk) {
    const int64_t end = nk - k0 < kChunk ? nk : k0 + kChunk;
    int64_t r = 0;
#if defined(CONV1X1_HAS_AVX512)
    if constexpr (kSize == 4) {
      for (; end - k0 == kChunk && r + 16 <= nr; r += 16) {
        const char* s = static_cast<const char*>(src) + r * pitch;
        if (end < nk)
          for (int i = 0; i < 32; ++i) __builtin_prefetch(s + i / 2 * pitch + end * kSize + i % 2 * 64);
        for (int64_t k = k0; k < end; k += 16) transpose_square_of(dst + k * ld + r, ld, s + k * kSize, pitch);
      }
    }
#endif
    for (; r + 4 <= nr; r += 4) {
      const char* s = static_cast<const char*>(src) + r * pitch;
      int64_t k = k0;
      if (end < nk)  // prefetch the next chunk
        for (int i = 0; i < 4; ++i)
          for (int64_t j = 0; j < kChunk; j += 64 / kSize) __builtin_prefetch(s + i * pitch + (end + j) * kSize);
      for (; k + 4 <= end; k += 4) {
        Four x[4];
        for (int i = 0; i < 4; ++i) __builtin_memcpy(&x[i], s + i * pitch + k * kSize, sizeof(Four));
        const Four lo0 = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5);
        const Four lo1 = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5);
        const Four hi0 = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
        const Four hi1 = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
        x[0] = __builtin_shufflevector(lo0, lo1, 0, 1, 4, 5);
        x[1] = __builtin_shufflevector(lo0, lo1, 2, 3, 6, 7);
        x[2] = __builtin_shufflevector(hi0, hi1, 0, 1, 4, 5);
        x[3] = __builtin_shufflevector(hi0, hi1, 2, 3, 6, 7);
        for (int i = 0; i < 4; ++i) __builtin_memcpy(dst + (k + i) * ld + r, &x[i], sizeof(Four));
      }
      for (; k < end; ++k)
        for (int i = 0; i < 4; ++i) __builtin_memcpy(dst + k * ld + r + i, s + i * pitch + k * kSize, sizeof(T));
    }
    for (; r < nr; ++r) {
      const char* s = static_cast<const char*>(src) + r * pitch;
      for (int64_t k = k0; k < end; ++k) __builtin_memcpy(dst + k * ld + r, s + k * kSize, sizeof(T));
    }
  }
}

template <class T, Mask M, class S>
void pack_rect_k_major(T* dst, int64_t ld, const Rect<S>& q) {
  constexpr bool mask = M != Mask::kNone;
  constexpr int64_t kSize = sizeof(T);
  if (q.rs == 1 && (!mask || q.ars == 1)) {
    copy_lines<T, M>(dst, ld, q.src, q.aux, q.ks, q.aks, q.nk, q.nr);
  } else if ((q.ks == 1 || q.ks == 2) && (!mask || q.aks == q.ks)) {
    if (M == Mask::kNone && sizeof(S) == sizeof(T) && q.ks == 1) {
      transpose(dst, ld, q.src, q.rs * kSize, q.nr, q.nk);
    } else {
      constexpr int64_t kChunk = 32;  // picked, converted and masked along k in L1, then transposed
      T staged[kMaxNr * kChunk];
      for (int64_t k = 0; k < q.nk; k += kChunk) {
        const int64_t nk = q.nk - k < kChunk ? q.nk - k : kChunk;
        for (int64_t r = 0; r < q.nr; r += kMaxNr) {
          const int64_t nr = q.nr - r < kMaxNr ? q.nr - r : kMaxNr;
          copy_lines_of<T, M>(q.ks, staged, kChunk, q.src + r * q.rs + k * q.ks,
                              mask ? q.aux + r * q.ars + k * q.aks : nullptr, q.rs, q.ars, nr, nk);
          transpose(dst + k * ld + r, ld, staged, kChunk * kSize, nr, nk);
        }
      }
    }
  } else if (q.rs == 2 && (!mask || q.ars == 2)) {
    copy_every_second<T, M>(dst, ld, q.src, q.aux, q.ks, q.aks, q.nk, q.nr);
  } else {
    copy_strided<T, M>(dst, 1, ld, q);
  }
}

template <class T, Mask M, class S>
void pack_rect_r_major(T* dst, int64_t ld, const Rect<S>& q) {
  const bool mask = M != Mask::kNone;
  if (!mask && !std::is_same<T, S>::value && q.ks == 1 && q.rs == q.nk && ld == q.nk)  // converted as one long line
    load_line(dst, q.src, q.nr * q.nk);
  else if ((q.ks == 1 || q.ks == 2) && (!mask || q.aks == q.ks))
    copy_lines_of<T, M>(q.ks, dst, ld, q.src, q.aux, q.rs, q.ars, q.nr, q.nk);
  else
    copy_strided<T, M>(dst, ld, 1, q);
}

template <class T, class S, bool K_MAJOR, Mask M>
void pack_masked(T* dst, int64_t ld, const S* src, const S* aux, const Axis& axis_r, int64_t r0, int64_t nr,
                 const Axis& axis_k, int64_t k0, int64_t nk) {
  for (int64_t r = 0; r < nr;) {
    const Run run_r = run_at(axis_r, r0 + r, nr - r);
    for (int64_t k = 0; k < nk;) {
      const Run run_k = run_at(axis_k, k0 + k, nk - k);
      const Rect<S> q{src + run_r.offset + run_k.offset,
                      M == Mask::kNone ? nullptr : aux + run_r.aux_offset + run_k.aux_offset,
                      run_r.stride,
                      run_k.stride,
                      run_r.aux_stride,
                      run_k.aux_stride,
                      run_r.length,
                      run_k.length};
      if constexpr (K_MAJOR)
        pack_rect_k_major<T, M>(dst + k * ld + r, ld, q);
      else
        pack_rect_r_major<T, M>(dst + r * ld + k, ld, q);
      k += run_k.length;
    }
    r += run_r.length;
  }
  if constexpr (K_MAJOR)
    for (int64_t k = 0; k < nk; ++k)
      for (int64_t r = nr; r < ld; ++r) dst[k * ld + r] = T(0);
}

template <class T, class S, bool K_MAJOR>
void pack(void* dst, int64_t ld, const void* src, const void* aux, const Axis& axis_r, int64_t r0, int64_t nr,
          const Axis& axis_k, int64_t k0, int64_t nk, Mask mask) {
  T* d = static_cast<T*>(dst);
  const S* s = static_cast<const S*>(src);
  const S* x = static_cast<const S*>(aux);
  switch (mask) {
    case Mask::kNone: return pack_masked<T, S, K_MAJOR, Mask::kNone>(d, ld, s, x, axis_r, r0, nr, axis_k, k0, nk);
    case Mask::kReLU: return pack_masked<T, S, K_MAJOR, Mask::kReLU>(d, ld, s, x, axis_r, r0, nr, axis_k, k0, nk);
    case Mask::kReLU6: return pack_masked<T, S, K_MAJOR, Mask::kReLU6>(d, ld, s, x, axis_r, r0, nr, axis_k, k0, nk);
  }
}

// How many rows ahead packing prefetches where it masks. dy and y are twice the data of a panel, and the prefetches of
// fetch_ahead.h do not always bring all of it in time.
constexpr int64_t kRowsAhead = 8;

template <class S>
inline void fetch_line(const S* p, int64_t n) {
  for (int64_t j = 0; j < n; j += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(p + j);
}

template <class T, class S, Mask M>
void pack_rows_masked(const Segment* segments, int count, const S* src, const S* aux, const Axis& axis_k, int64_t k0,
                      int64_t nk) {
  for (int64_t k = 0; k < nk;) {
    const Run run = run_at(axis_k, k0 + k, nk - k);
    for (int64_t i = 0; i < run.length; ++i, ++k) {
      const S* s = src + run.offset + i * run.stride;
      const S* x = M == Mask::kNone ? s : aux + run.aux_offset + i * run.aux_stride;
      for (const Segment* g = segments; g < segments + count; ++g) {
        T* d = static_cast<T*>(g->dst) + k * g->ld;
        if (M != Mask::kNone && i + kRowsAhead < run.length) {
          fetch_line(s + g->offset + kRowsAhead * run.stride, g->length);
          fetch_line(x + g->aux_offset + kRowsAhead * run.aux_stride, g->length);
        }
        copy_line<T, M>(d, s + g->offset, x + g->aux_offset, g->length);
        for (int64_t z = g->length; z < g->length + g->zeros; ++z) d[z] = T(0);
      }
    }
  }
}

template <class T, class S>
void pack_rows(const Segment* segments, int count, const void* src, const void* aux, const Axis& axis_k, int64_t k0,
               int64_t nk, Mask mask) {
  const S *s = static_cast<const S*>(src), *x = static_cast<const S*>(aux);
  switch (mask) {
    case Mask::kNone: return pack_rows_masked<T, S, Mask::kNone>(segments, count, s, x, axis_k, k0, nk);
    case Mask::kReLU: return pack_rows_masked<T, S, Mask::kReLU>(segments, count, s, x, axis_k, k0, nk);
    case Mask::kReLU6: return pack_rows_masked<T, S, Mask::kReLU6>(segments, count, s, x, axis_k, k0, nk);
  }
}

// d[c * ldd + r] = t[r * ld + c], converting.
template <class T, class S>
void store_transposed(S* d, int64_t ldd, const T* t, int64_t ld, int64_t rows, int64_t cols) {
  if constexpr (std::is_same<S, T>::value) {
    transpose(d, ldd, t, ld * static_cast<int64_t>(sizeof(T)), rows, cols);
  } else {
    S staged[kMaxMr * kMaxNr];
    for (int64_t r = 0; r < rows; r += kMaxMr) {
      const int64_t nr = rows - r < kMaxMr ? rows - r : kMaxMr;
      for (int64_t c = 0; c < cols; c += kMaxNr) {
        const int64_t nc = cols - c < kMaxNr ? cols - c : kMaxNr;
        for (int64_t i = 0; i < nr; ++i) store_line(staged + i * kMaxNr, t + (r + i) * ld + c, nc);
        transpose(&d[c * ldd + r].bits, ldd, staged, kMaxNr * static_cast<int64_t>(sizeof(S)), nr, nc);
      }
    }
  }
}

template <class T, class S>
void unpack(void* dst, const Axis& row, int64_t r0, int64_t nr, const Axis& col, int64_t c0, int64_t nc,
            const void* tile, int64_t ld) {
  const T* t = static_cast<const T*>(tile);
  for (int64_t r = 0; r < nr;) {
    const Run run_r = run_at(row, r0 + r, nr - r);
    for (int64_t c = 0; c < nc;) {
      const Run run_c = run_at(col, c0 + c, nc - c);
      S* d = static_cast<S*>(dst) + run_r.offset + run_c.offset;
      if (run_r.stride == 1 && run_c.stride != 1 && run_r.length > 1) {
        store_transposed(d, run_c.stride, t + r * ld + c, ld, run_r.length, run_c.length);
        c += run_c.length;
        continue;
      }
      for (int64_t i = 0; i < run_r.length; ++i) {
        const T* from = t + (r + i) * ld + c;
        S* to = d + i * run_r.stride;
        if (run_c.stride == 1)
          store_line(to, from, run_c.length);
        else
          for (int64_t j = 0; j < run_c.length; ++j) store_as(to + j * run_c.stride, from[j]);
      }
      c += run_c.length;
    }
    r += run_r.length;
  }
}

template <class T>
void pool_tile(double* sums, const void* tile, int64_t ld, int64_t pixels, int64_t channels, bool columns) {
  constexpr int64_t kSide = 8;
  typedef T Line __attribute__((vector_size(kSide * sizeof(T))));
  typedef double Sums __attribute__((vector_size(kSide * sizeof(double))));
  const T* t = static_cast<const T*>(tile);
  T turned[kMaxNr * kMaxMr];
  if (columns) {
    transpose(turned, kMaxMr, t, ld * static_cast<int64_t>(sizeof(T)), channels, pixels);
    t = turned;
    ld = kMaxMr;
  }
  int64_t c = 0;
  for (; c + kSide <= channels; c += kSide) {
    Sums sum;
    load_lanes(sum, sums + c);
    for (int64_t i = 0; i < pixels; ++i) {
      Line x;
      load_lanes(x, t + i * ld + c);
      sum += __builtin_convertvector(x, Sums);
    }
    __builtin_memcpy(sums + c, &sum, sizeof sum);
  }
  for (; c < channels; ++c)
    for (int64_t i = 0; i < pixels; ++i) sums[c] += static_cast<double>(t[i * ld + c]);
}

// Eight lanes, each all ones or zero, as the bits of a byte.
template <class V>
uint64_t bits_of(const V& lanes) {
  typedef int8_t Bytes __attribute__((vector_size(8)));
  const Bytes bytes = __builtin_convertvector(lanes, Bytes);
  uint64_t x;
  __builtin_memcpy(&x, &bytes, sizeof x);
  return (x & 0x8040201008040201u) * 0x0101010101010101u >> 56;
}

template <class T>
void put_bits(uint8_t* bits, int64_t at, int64_t pitch, const void* tile, int64_t ld, int64_t m, int64_t n, double low,
              double high) {
  const T least = static_cast<T>(low), most = static_cast<T>(high);
  typedef T Line __attribute__((vector_size(8 * sizeof(T))));
  for (int64_t i = 0; i < m; ++i, at += pitch) {
    const T* row = static_cast<const T*>(tile) + i * ld;
    unsigned __int128 word = 0;
    for (int64_t j = 0; j < n; j += 8) {
      Line y = {};
      if (n - j >= 8)
        load_lanes(y, row + j);
      else
        for (int64_t l = j; l < n; ++l) y[l - j] = row[l];
      const auto passes = ~(y <= least) & ~(y >= most);
      word |= static_cast<unsigned __int128>(bits_of(passes)) << j;
    }
    const int64_t shift = at & 7, end = shift + n, bytes = (end + 7) / 8;
    word <<= shift;
    for (int64_t b = 0; b < bytes; ++b, word >>= 8) {
      uint8_t* byte = bits + (at >> 3) + b;
      if ((b == 0 && shift != 0) || (b + 1 == bytes && end % 8 != 0))  // shared with a tile, perhaps of another thread
        __atomic_fetch_or(byte, static_cast<uint8_t>(word), __ATOMIC_RELAXED);
      else
        *byte = static_cast<uint8_t>(word);
    }
  }
}

template <class T>
void take_bits(void* z, const uint8_t* bits, int64_t at, int64_t n, const void* grads, bool one_grad, double scale) {
  typedef T Line __attribute__((vector_size(8 * sizeof(T))));
  typedef decltype(Line() <= Line()) Signs;
  const Signs each = {1, 2, 4, 8, 16, 32, 64, 128};
  const T *from = static_cast<const T*>(grads), times = static_cast<T>(scale);
  T* to = static_cast<T*>(z);
  Line grad = Line{} + from[0] * times;
  for (int64_t j = 0; j < n; j += 8) {
    const uint8_t* byte = bits + ((at + j) >> 3);
    const int eight = (byte[0] | byte[1] << 8) >> ((at + j) & 7) & 255;
    const int64_t size = (n - j < 8 ? n - j : 8) * static_cast<int64_t>(sizeof(T));
    if (!one_grad) {
      __builtin_memcpy(&grad, from + j, static_cast<size_t>(size));
      grad *= times;
    }
    const Line kept = ((Signs{} + eight) & each) != 0 ? grad : Line{};
    __builtin_memcpy(to + j, &kept, static_cast<size_t>(size));
  }
}

template <class T, class S>
void fill_conversion(Microkernel& kernel, DType storage) {
  const int i = static_cast<int>(storage);
  kernel.gather[i] = pack<T, S, false>;
  kernel.pool = pool_tile<T>;
  kernel.put_bits = put_bits<T>;
  kernel.take_bits = take_bits<T>;
  kernel.unpack[i] = unpack<T, S>;
}

template <class T, class S>
void fill_packing_for(Microkernel& kernel, DType storage) {
  const int i = static_cast<int>(storage);
  kernel.pack_a[static_cast<int>(AccessA::kRows)][i] = pack<T, S, false>;
  kernel.pack_a[static_cast<int>(AccessA::kCols)][i] = kernel.pack_b[i] = pack<T, S, true>;
  kernel.pack_rows[i] = pack_rows<T, S>;
  fill_conversion<T, S>(kernel, storage);
  kernel.sum_rows = sum_rows<T, T, 1>;
  kernel.sum_columns = sum_columns<T, T, 1>;
}

inline void fill_packing(Microkernel& kernel, const float*) {
  fill_packing_for<float, float>(kernel, DType::kFloat32);
  fill_packing_for<float, BFloat16>(kernel, DType::kBFloat16);
  fill_packing_for<float, Float16>(kernel, DType::kFloat16);
}

inline void fill_packing(Microkernel& kernel, const double*) {
  fill_packing_for<double, double>(kernel, DType::kFloat64);
}

CONV1X1_KERNELS_END
