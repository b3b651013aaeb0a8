// The microkernel table, and the driver with weights packed beforehand, for tests and microbenchmarks. It takes NumPy
// arrays and needs no torch. bench/microkernel_table.py builds it from the same sources and flags as the library, which
// has no Python symbol.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "../plan/plan.h"
#include "amx/amx_kernel.h"

namespace py = pybind11;

namespace {

using conv1x1::AccessA;
using conv1x1::Microkernel;

const Microkernel& find(const std::string& name) {
  const conv1x1::KernelTable table = conv1x1::all_microkernels();
  for (size_t i = 0; i < table.count; ++i)
    if (name == table.kernels[i]->name) return *table.kernels[i];
  throw std::invalid_argument("no microkernel '" + name + "' on this machine");
}

std::vector<py::dict> list() {
  std::vector<py::dict> kernels;
  const conv1x1::KernelTable table = conv1x1::all_microkernels();
  for (size_t i = 0; i < table.count; ++i) {
    const Microkernel& k = *table.kernels[i];
    py::dict d;
    d["name"] = k.name;
    d["isa"] = k.isa;
    d["dtype"] = conv1x1::dtype_name(k.dtype);
    // With several parts: the dtype that is their sum.
    const char* whole = k.parts == 3 ? "float32" : (k.parts == 2 ? "float16" : nullptr);
    d["operand"] = whole ? whole : conv1x1::dtype_name(k.operand);
    d["b"] = whole ? whole : conv1x1::dtype_name(k.b_in_place);
    d["parts"] = k.parts;
    d["kr"] = k.kr;
    d["ks"] = k.ks;
    d["mr"] = k.mr;
    d["nr"] = k.nr;
    d["vector"] = k.vector;
    d["splits"] = k.splits;
    d["pitched"] = k.fma && k.fma->pitched;
    kernels.push_back(d);
  }
  return kernels;
}

template <class T>
struct Call {
  // Of the kernel's family one is used; `args` is what they share.
  conv1x1::FmaTileArgs fma;
  conv1x1::AmxTileArgs amx;
  conv1x1::TileArgs* args = nullptr;
  conv1x1::FmaTileFn fma_fn = nullptr;
  conv1x1::AmxTileFn amx_fn = nullptr;
  conv1x1::Epilogue epilogue;
  std::vector<const void*> rows;
  std::vector<T> partial;

  void begin(const Microkernel& kernel, AccessA access, int64_t m, int64_t n) {
    args = kernel.amx ? static_cast<conv1x1::TileArgs*>(&amx) : &fma;
    if (kernel.amx)
      amx_fn = kernel.amx->tile(access, m, n);
    else
      fma_fn = kernel.fma->fn[m - 1][(n + kernel.vector - 1) / kernel.vector - 1];
  }
  void run() const { amx_fn ? amx_fn(amx) : fma_fn(fma); }
};

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// a: (m, k) if rows else (k, m); b: (k, ldb >= n); out: (>= m, ld >= n), written in place. P and PB: elements of A and
// B, float16 as uint16, two bfloat16 as one uint32 where the kernel takes two k a step, and k counts those. Where KS >
// 1, k is whole KS, and columns of a are (k / KS, m, KS) in memory; several parts are further steps of each KS, and a
// is followed by what is read of rows past the last one. For a strip of `tiles` tiles, a and out have that many times
// the rows; the strip is computed in pieces of k that many chains long. `order` gives the row of `a` for each row of
// the strip, for kernels that take a pointer for each row. `panels` of b lie below each other; their columns of out,
// c_in, residual and bias_n are side by side.
template <class T, class P, class PB>
void prepare(Call<T>& call, const Microkernel& kernel, bool rows, const Array<P>& a, const Array<PB>& b, Array<T>& out,
             int64_t n, int64_t tiles = 1, int64_t panels = 1, const std::vector<int64_t>& order = {}) {
  const bool pairs = std::is_same<P, uint32_t>::value, float16_b = std::is_same<PB, uint16_t>::value;
  if ((kernel.dtype == conv1x1::DType::kFloat64) != (sizeof(T) == 8) || (kernel.kr == 2) != pairs ||
      (kernel.b_in_place == conv1x1::DType::kFloat16) != float16_b)
    throw std::invalid_argument("the arrays' dtypes are not the microkernel's");
  if (tiles < 1 || a.shape(0) % tiles != 0) throw std::invalid_argument("no strip of so many tiles");
  const int64_t first = a.shape(0) / tiles, m = rows ? first : a.shape(1), k = rows ? a.shape(1) : first;
  if (panels < 1 || (panels > 1 && (!kernel.amx || n != kernel.nr)))
    throw std::invalid_argument("the microkernel computes no panels side by side, or whole ones only");
  if (m < 1 || m > kernel.mr || n < 1 || n > kernel.nr || b.shape(0) != k * panels || b.shape(1) < n ||
      out.shape(0) < m * tiles || out.shape(1) < n * panels || k % (kernel.ks * kernel.parts) != 0 ||
      (kernel.amx && b.shape(1) < (n + kernel.vector - 1) / kernel.vector * kernel.vector))
    throw std::invalid_argument("shapes do not fit the microkernel");
  if (!order.empty() &&
      (!rows || kernel.amx || kernel.fma->pitched || static_cast<int64_t>(order.size()) != m * tiles ||
       *std::max_element(order.begin(), order.end()) >= m * tiles || *std::min_element(order.begin(), order.end()) < 0))
    throw std::invalid_argument("the microkernel takes no rows in this order");
  if (!kernel.amx || rows)
    for (int64_t i = 0; order.empty() && i < m; ++i) call.rows.push_back(a.data() + i * (rows ? k : 1));
  for (const int64_t i : order) call.rows.push_back(a.data() + i * k);
  call.begin(kernel, rows ? AccessA::kRows : AccessA::kCols, m, n);
  conv1x1::TileArgs& args = *call.args;
  args.k = k;
  args.chain = 64 / kernel.kr * kernel.parts;  // as the library plans it for most layers
  args.m = m;
  args.n = n;
  args.tiles = tiles;
  args.a_rows = call.rows.data();
  args.a_step = order.empty() ? m * k * static_cast<int64_t>(sizeof(P)) : 0;
  args.b = b.data();
  args.ldb = b.shape(1);
  args.c_out = out.mutable_data();
  args.ld_out = out.shape(1);
  call.partial.resize(static_cast<size_t>(kernel.mr * kernel.nr * tiles));
  call.fma.partial = call.partial.data();
  call.fma.piece = args.chain * tiles;
  call.fma.a_pitch = (rows ? k : 1) * static_cast<int64_t>(sizeof(P));
  call.fma.a_k = rows ? 1 : m;
  call.fma.rows_per_tile = order.empty() ? 0 : m;
  call.fma.fetch_out = true;
  call.amx.a = a.data();
  call.amx.lda = m;
  call.amx.panels = panels;
  call.amx.b_step = k * b.shape(1) * static_cast<int64_t>(sizeof(PB));
  call.amx.panel_in = call.amx.panel_out = n;
}

using Splits = std::vector<std::array<int64_t, 3>>;  // lanes, at, then of each vector of columns

// The caller makes sure that they, residual and out lie within the arrays.
template <class T>
std::vector<conv1x1::Split> split(const Microkernel& kernel, const Splits& splits, Call<T>& call) {
  if (!splits.empty() && (!kernel.splits || static_cast<int64_t>(splits.size()) * kernel.vector < call.args->n))
    throw std::invalid_argument("the microkernel has no splits, or more vectors");
  std::vector<conv1x1::Split> all;
  for (const auto& s : splits) all.push_back({s[0], s[1], s[2]});
  call.args->splits = all.empty() ? nullptr : all.data();
  return all;
}

// Calls what must be called before and after a thread's calls of a microkernel.
class Entered {
 public:
  explicit Entered(const Microkernel& kernel) : kernel_(kernel) {
    if (kernel_.amx) kernel_.amx->enter();
  }
  ~Entered() {
    if (kernel_.amx) kernel_.amx->leave();
  }

 private:
  const Microkernel& kernel_;
};

// One call for a strip of tiles. A kernel whose stores may wait gets one call for each half of the strip: the stores of
// the first call wait for the second call, those of the second call for the end.
template <class T>
void call_strip(const Microkernel& kernel, Call<T>& call) {
  const Entered entered(kernel);
  if (!kernel.amx) return call.run();
  alignas(64) char pending[conv1x1::kMaxPending] = {};
  const bool half = call.epilogue.store != conv1x1::Store::kAsIs;
  const int64_t size = half ? 2 : static_cast<int64_t>(sizeof(T)), m = call.args->m;
  const auto on = [](const void* from, int64_t bytes) {
    return from ? static_cast<const char*>(from) + bytes : nullptr;
  };
  conv1x1::AmxTileArgs& args = call.amx;
  args.pending = pending;
  const int64_t first = args.tiles / 2, second = args.tiles - first;
  if (first > 0) {
    args.tiles = first;
    call.run();
  }
  args.tiles = second;
  conv1x1::Epilogue epilogue = call.epilogue;
  epilogue.bias_m = on(epilogue.bias_m, first * m * static_cast<int64_t>(sizeof(T)));
  epilogue.residual = on(epilogue.residual, first * m * epilogue.ld_residual * size);
  if (args.epilogue) args.epilogue = &epilogue;
  for (const void*& row : call.rows) row = on(row, first * args.a_step);
  args.a = on(args.a, first * args.a_step);
  args.c_out = static_cast<char*>(args.c_out) + first * m * args.ld_out * size;
  call.run();
  kernel.amx->finish_pending(pending);
}

template <class T>
const T* pointer(const py::object& o) {
  if (o.is_none()) return nullptr;
  // A cast would make a temporary copy of anything else.
  if (!Array<T>::check_(o)) throw std::invalid_argument("expected C-contiguous arrays of the operands' dtype");
  return o.cast<Array<T>>().data();
}

template <class T>
int64_t columns(const py::object& o) {
  return o.is_none() ? 0 : o.cast<Array<T>>().shape(1);
}

template <class T, class P, class PB>
void run(const std::string& name, bool rows, Array<P> a, Array<PB> b, Array<T> out, int64_t n, py::object c_in,
         py::object bias_m, py::object bias_n, py::object residual, double lower, double upper, bool with_epilogue,
         int64_t tiles, int64_t panels, const Splits& splits, const std::vector<int64_t>& order) {
  const Microkernel& kernel = find(name);
  Call<T> call;
  prepare<T, P, PB>(call, kernel, rows, a, b, out, n, tiles, panels, order);
  const auto places = split(kernel, splits, call);
  call.args->c_in = pointer<T>(c_in);
  call.args->ld_in = columns<T>(c_in);
  call.epilogue.bias_m = pointer<T>(bias_m);
  call.epilogue.bias_n = pointer<T>(bias_n);
  call.epilogue.residual = pointer<T>(residual);
  call.epilogue.ld_residual = columns<T>(residual);
  call.epilogue.lower = lower;
  call.epilogue.upper = upper;
  call.args->epilogue = with_epilogue ? &call.epilogue : nullptr;
  call_strip(kernel, call);
}

// One call of a kernel in parts that reads an operand in place, masked by `saved` where it is not none: A, rows of k of
// all tiles, or B, k rows of columns, of each panel two vectors: (lanes of the first run, where it begins, where the
// others would begin if they went before it). S: its dtype in memory; panel: the other operand's, as for run().
template <class S>
void run_in_place(const std::string& name, bool of_a, Array<S> in_place, Array<uint32_t> panel, Array<float> out,
                  int64_t m, int64_t n, int64_t tiles, int64_t panels, py::object saved, const Splits& vectors) {
  const Microkernel& kernel = find(name);
  const int64_t nv = (n + kernel.vector - 1) / kernel.vector, k = in_place.shape(of_a ? 1 : 0);
  const int64_t group = kernel.kr * kernel.ks, pitch = in_place.shape(1) * static_cast<int64_t>(sizeof(S));
  if (!kernel.amx || kernel.parts != (sizeof(S) == 4 ? 3 : 2) || m < 1 || m > kernel.mr || n < 1 || n > kernel.nr)
    throw std::invalid_argument("the microkernel has no such parts, or no such tile");
  conv1x1::AmxTileArgs args;
  args.k = (k + group - 1) / group * kernel.ks * kernel.parts;
  args.m = m;
  args.n = n;
  args.chain = 64 / kernel.kr * kernel.parts;
  args.tiles = tiles;
  args.panels = panels;
  args.panel_out = n;
  args.a = args.b = panel.data();
  args.lda = m;
  args.ldb = nv * kernel.vector;
  args.c_out = out.mutable_data();
  args.ld_out = out.shape(1);
  if (out.shape(0) < m * tiles || out.shape(1) < n * panels || panel.size() < args.k * (of_a ? args.ldb : m) ||
      (of_a ? in_place.shape(0) < m * tiles : static_cast<int64_t>(vectors.size()) < 2 * panels))
    throw std::invalid_argument("shapes do not fit the microkernel");
  std::vector<conv1x1::OnTheFlyVector> places;
  for (size_t i = 0; i < vectors.size(); ++i) {
    const auto& [lanes, at, then] = vectors[i];
    const int64_t left = std::min<int64_t>(n - static_cast<int64_t>(i % 2) * kernel.vector, kernel.vector);
    const uint32_t all = left > 0 ? (uint32_t{1} << left) - 1 : 0, first = all & ((uint32_t{1} << lanes) - 1);
    places.push_back({at, then, at, then, at, at, static_cast<uint16_t>(first), static_cast<uint16_t>(all & ~first)});
  }
  conv1x1::OnTheFly on_the_fly{};
  on_the_fly.src = reinterpret_cast<const char*>(in_place.data());
  on_the_fly.aux = reinterpret_cast<const char*>(pointer<S>(saved));
  on_the_fly.pitch = on_the_fly.aux_pitch = pitch;
  on_the_fly.group = on_the_fly.aux_group = of_a ? group * static_cast<int64_t>(sizeof(S)) : group * pitch;
  on_the_fly.step = on_the_fly.aux_step = m * pitch;
  on_the_fly.k = k;
  on_the_fly.vectors = places.data();
  on_the_fly.split =
      kernel.amx
          ->on_the_fly[of_a ? 0 : 1][static_cast<int>(on_the_fly.aux ? conv1x1::Mask::kReLU : conv1x1::Mask::kNone)];
  args.on_the_fly = &on_the_fly;
  const Entered entered(kernel);
  kernel.amx->tile(of_a ? AccessA::kRows : AccessA::kCols, m, n)(args);
}

// Best GFLOP/s of `rounds` rounds of `calls` tiles of n columns of one microkernel, operands in cache.
template <class T, class P, class PB>
double time_tile(const std::string& name, bool rows, Array<P> a, Array<PB> b, Array<T> out, int64_t n, int rounds,
                 int calls) {
  const Microkernel& kernel = find(name);
  Call<T> call;
  prepare<T, P, PB>(call, kernel, rows, a, b, out, n);
  py::gil_scoped_release release;  // inside: the arrays' reference counts change outside of it
  const Entered entered(kernel);
  double best = 0;
  for (int r = 0; r < rounds; ++r) {
    const auto begin = std::chrono::steady_clock::now();
    for (int c = 0; c < calls; ++c) call.run();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    const double k = static_cast<double>(call.args->k * kernel.kr / kernel.parts);
    const double rate = 2.0 * k * static_cast<double>(call.args->m * n) * calls / seconds / 1e9;
    if (rate > best) best = rate;
  }
  return best;
}

template <class T>
void activate(const std::string& name, Array<T> tile, int activation) {
  find(name).activate(tile.mutable_data(), tile.shape(1), tile.shape(0), tile.shape(1),
                      static_cast<conv1x1::Activation>(activation));
}

// As the library stores a tile in a half type, where the kernel does: out and residual are their bits.
void store_half(const std::string& name, bool rows, Array<uint32_t> a, Array<uint32_t> b, Array<uint16_t> out,
                int64_t n, py::object residual, py::object bias_m, py::object bias_n, double lower, double upper,
                int64_t tiles, int64_t panels, const Splits& splits) {
  const Microkernel& kernel = find(name);
  std::vector<float> whole(static_cast<size_t>(out.shape(0) * out.shape(1)));
  Array<float> shape({out.shape(0), out.shape(1)}, whole.data());
  Call<float> call;
  prepare<float, uint32_t, uint32_t>(call, kernel, rows, a, b, shape, n, tiles, panels);
  const auto places = split(kernel, splits, call);
  call.args->c_out = out.mutable_data();
  call.epilogue.residual = pointer<uint16_t>(residual);
  call.epilogue.ld_residual = columns<uint16_t>(residual);
  call.epilogue.bias_m = pointer<float>(bias_m);
  call.epilogue.bias_n = pointer<float>(bias_n);
  call.epilogue.lower = lower;
  call.epilogue.upper = upper;
  call.epilogue.store = kernel.parts == 2 ? conv1x1::Store::kFloat16 : conv1x1::Store::kBFloat16;
  call.args->epilogue = &call.epilogue;
  call_strip(kernel, call);
}

// Forward or dgrad of one image by the driver, with panels of the weight made beforehand; without, where `beforehand`
// is false. in, out: (pixels, channels) if channels_last else (channels, pixels); w: (c_out, c_in). S: float, double,
// or the bits of a half type. Returns the panels' bytes, zero where this weight is read in place.
template <class S>
int64_t with_packed_weight(const std::string& dtype, Array<S> in, Array<S> w, Array<S> out, bool channels_last,
                           bool dgrad, int threads, bool beforehand) {
  std::string error;
  const conv1x1::KernelSet* kernels = conv1x1::selected_kernels(&error);
  if (kernels == nullptr) throw std::invalid_argument(error);
  conv1x1::Conv1x1Problem p;
  for (int t = 0; t < 4; ++t)
    if (dtype == conv1x1::dtype_name(static_cast<conv1x1::DType>(t))) p.dtype = static_cast<conv1x1::DType>(t);
  p.batch = 1;
  p.c_out = w.shape(0);
  p.c_in = w.shape(1);
  p.in_size[2] = p.out_size[2] = in.shape(channels_last ? 0 : 1);
  const auto view = [&](Array<S>& array) {
    conv1x1::ActivationView v;
    v.data = array.mutable_data();
    v.stride[1] = channels_last ? 1 : array.shape(1);
    v.stride[4] = channels_last ? array.shape(1) : 1;
    return v;
  };
  p.w = {w.mutable_data(), p.c_in, 1};
  (dgrad ? p.dy : p.x) = view(in);
  (dgrad ? p.dx : p.y) = view(out);
  conv1x1::GemmProblem g = dgrad ? conv1x1::lower_dgrad(p) : conv1x1::lower_fprop(p);
  const int64_t bytes = conv1x1::packed_weight_bytes(g, *kernels);
  void* panels = nullptr;
  if (beforehand && bytes > 0) {
    if (posix_memalign(&panels, 64, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
    conv1x1::pack_weight(g, *kernels, panels);
    g.packed_weight = panels;
  }
  const conv1x1::Status status = conv1x1::run_gemm(g, conv1x1::make_plan(g, threads, *kernels));
  std::free(panels);
  if (status != conv1x1::kOk) throw std::bad_alloc();
  return bytes;
}

template <class S>
void define_packed(py::module_& m) {
  m.def("with_packed_weight", &with_packed_weight<S>, py::arg("dtype"), py::arg("input").noconvert(),
        py::arg("weight").noconvert(), py::arg("out").noconvert(), py::arg("channels_last"), py::arg("dgrad"),
        py::arg("threads"), py::arg("beforehand"));
}

template <class T, class P, class PB>
void define_runs(py::module_& m) {
  m.def("run", &run<T, P, PB>, py::arg("name"), py::arg("rows"), py::arg("a").noconvert(), py::arg("b").noconvert(),
        py::arg("out").noconvert(), py::arg("n"), py::arg("c_in") = py::none(), py::arg("bias_m") = py::none(),
        py::arg("bias_n") = py::none(), py::arg("residual") = py::none(), py::arg("lower") = 0.0,
        py::arg("upper") = 0.0, py::arg("with_epilogue") = false, py::arg("tiles") = 1, py::arg("panels") = 1,
        py::arg("splits") = Splits(), py::arg("order") = std::vector<int64_t>());
  m.def("time", &time_tile<T, P, PB>, py::arg("name"), py::arg("rows"), py::arg("a").noconvert(),
        py::arg("b").noconvert(), py::arg("out").noconvert(), py::arg("n"), py::arg("rounds"), py::arg("calls"));
}

template <class S>
void define_in_place(py::module_& m) {
  m.def("run_in_place", &run_in_place<S>, py::arg("name"), py::arg("of_a"), py::arg("in_place").noconvert(),
        py::arg("panel").noconvert(), py::arg("out").noconvert(), py::arg("m"), py::arg("n"), py::arg("tiles"),
        py::arg("panels"), py::arg("saved"), py::arg("vectors"));
}

template <class T>
void define(py::module_& m) {
  define_runs<T, T, T>(m);
  m.def("activate", &activate<T>, py::arg("name"), py::arg("tile").noconvert(), py::arg("activation"));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "conv1x1_ext's microkernel table, torch-free";
  m.def("list", &list);
  define<float>(m);
  define<double>(m);
  define_runs<float, uint32_t, uint32_t>(m);
  define_runs<float, float, uint16_t>(m);
  define_in_place<float>(m);
  define_in_place<uint16_t>(m);
  define_packed<float>(m);
  define_packed<double>(m);
  define_packed<uint16_t>(m);
  constexpr double inf = std::numeric_limits<double>::infinity();
  m.def("store_half", &store_half, py::arg("name"), py::arg("rows"), py::arg("a").noconvert(), py::arg("b").noconvert(),
        py::arg("out").noconvert(), py::arg("n"), py::arg("residual") = py::none(), py::arg("bias_m") = py::none(),
        py::arg("bias_n") = py::none(), py::arg("lower") = -inf, py::arg("upper") = inf, py::arg("tiles") = 1,
        py::arg("panels") = 1, py::arg("splits") = Splits());
}
