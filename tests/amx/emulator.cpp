// AMX on a CPU that has none: a handler of SIGILL decodes the instruction that the CPU refused, does on this thread's
// tiles what the manual says, and goes on after it. So the library's real machine code runs, every address and every
// operand of it. Anything that a CPU with AMX would refuse ends the process with a message and kFault.
//
// The handler runs on the stack of the thread that met the instruction (no SA_ONSTACK), which is in the library's own
// code, so nothing that the handler uses is half-way through something else.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // the intrinsics' own undefined operands (GCC bug 105593)
#endif
#include <immintrin.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kFault = 86, kTiles = 8, kMaxRows = 16, kMaxRowBytes = 64;

struct Tile {
  int rows, row_bytes;
  alignas(64) unsigned char data[kMaxRows][kMaxRowBytes];
};

struct State {
  bool configured;
  unsigned char configuration[64];
  Tile tile[kTiles];
};

thread_local State state;

enum Instruction { kLdtilecfg, kSttilecfg, kTilerelease, kTilezero, kTileloadd, kTilestored, kTdpbf16ps, kKinds };
std::atomic<long> counts[kKinds];
std::atomic<long> configured_threads;
struct sigaction previous;

uint64_t current;  // for messages: the address of the instruction; one process dies of one fault

[[noreturn]] void fault(const char* format, ...) {
  char text[400];
  int n = snprintf(text, sizeof text, "AMX emulator: at %#llx: ", static_cast<unsigned long long>(current));
  va_list args;
  va_start(args, format);
  n += vsnprintf(text + n, sizeof text - static_cast<size_t>(n) - 2, format, args);
  va_end(args);
  text[n++] = '\n';
  if (write(2, text, static_cast<size_t>(n)) < 0) _exit(kFault + 1);
  _exit(kFault);
}

void need_configuration(const char* name) {
  if (!state.configured) fault("%s: tiles are not configured", name);
}

Tile& tile(const char* name, int t) {
  need_configuration(name);
  if (t >= kTiles) fault("%s: there is no tmm%d", name, t);
  if (state.tile[t].rows == 0) fault("%s: tmm%d has no rows in this configuration", name, t);
  return state.tile[t];
}

void set_configured(bool now) {
  if (now != state.configured) configured_threads += now ? 1 : -1;
  state.configured = now;
}

void ldtilecfg(const unsigned char* bytes) {
  unsigned char c[64];
  memcpy(c, bytes, sizeof c);
  if (c[0] > 1) fault("ldtilecfg: palette %d", c[0]);
  memset(state.tile, 0, sizeof state.tile);
  memset(state.configuration, 0, sizeof state.configuration);
  if (c[0] == 0) return set_configured(false);
  for (int i = 2; i < 64; ++i)
    if (c[i] && (i < 16 || (i >= 32 && i < 48) || i >= 56)) fault("ldtilecfg: reserved byte %d is %d", i, c[i]);
  if (c[1]) fault("ldtilecfg: start row %d: no instruction was interrupted", c[1]);
  for (int t = 0; t < kTiles; ++t) {
    const int row_bytes = c[16 + 2 * t] | c[17 + 2 * t] << 8, rows = c[48 + t];
    if (row_bytes > kMaxRowBytes || rows > kMaxRows) fault("ldtilecfg: tmm%d: %d rows of %d bytes", t, rows, row_bytes);
    if ((row_bytes == 0) != (rows == 0)) fault("ldtilecfg: tmm%d: %d rows of %d bytes", t, rows, row_bytes);
    state.tile[t].rows = rows;
    state.tile[t].row_bytes = row_bytes;
  }
  memcpy(state.configuration, c, sizeof c);
  set_configured(true);
}

// float32 fused multiply-add and addition of the tile unit: round to nearest even, denormals in and out are zero, no
// exceptions. `lanes` of one row at once, by the CPU's own instructions under those settings of MXCSR.
constexpr unsigned kMxcsr = _MM_MASK_MASK | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON | _MM_ROUND_NEAREST;

__attribute__((target("avx512f,avx512bw"), noinline)) void multiply(Tile& c, const Tile& a, const Tile& b) {
  const int steps = a.row_bytes / 4;
  const auto columns = static_cast<__mmask16>((1u << (c.row_bytes / 4)) - 1);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int m = 0; m < c.rows; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < steps; ++k) {
      int pair;
      memcpy(&pair, a.data[m] + 4 * k, 4);
      const __m512i x = _mm512_set1_epi32(pair), y = _mm512_loadu_si512(b.data[k]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
                            _mm512_castsi512_ps(_mm512_and_si512(y, high)), odd);
    }
    const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(c.data[m]), _mm512_add_ps(even, odd));
    _mm512_storeu_ps(c.data[m], _mm512_maskz_mov_ps(columns, sum));
  }
}

void tdpbf16ps(int dst, int src1, int src2) {
  const char* name = "tdpbf16ps";
  Tile &c = tile(name, dst), &a = tile(name, src1), &b = tile(name, src2);
  if (dst == src1 || dst == src2 || src1 == src2)
    fault("%s: tmm%d, tmm%d, tmm%d: not three tiles", name, dst, src1, src2);
  if (c.row_bytes % 4 || a.row_bytes % 4 || b.row_bytes % 4) fault("%s: rows that are no whole pairs", name);
  if (c.rows != a.rows) fault("%s: C has %d rows, A %d", name, c.rows, a.rows);
  if (a.row_bytes / 4 != b.rows) fault("%s: A has %d pairs in a row, B %d rows", name, a.row_bytes / 4, b.rows);
  if (c.row_bytes != b.row_bytes) fault("%s: rows of C have %d bytes, of B %d", name, c.row_bytes, b.row_bytes);
  const unsigned mxcsr = _mm_getcsr();
  _mm_setcsr(kMxcsr);
  multiply(c, a, b);
  _mm_setcsr(mxcsr);
}

void tileloadd(int t, const unsigned char* base, int64_t stride) {
  Tile& to = tile("tileloadd", t);
  memset(to.data, 0, sizeof to.data);
  for (int r = 0; r < to.rows; ++r) memcpy(to.data[r], base + r * stride, static_cast<size_t>(to.row_bytes));
}

void tilestored(int t, unsigned char* base, int64_t stride) {
  const Tile& from = tile("tilestored", t);
  for (int r = 0; r < from.rows; ++r) memcpy(base + r * stride, from.data[r], static_cast<size_t>(from.row_bytes));
}

constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// The operand of ModRM, and what follows it: base + displacement, and the index apart, which is a stride for tiles.
struct Memory {
  uint64_t base = 0, index = 0;
  bool sib = false;
};

Memory decode_memory(const unsigned char*& p, int mod, int rm, bool x, bool b, const greg_t* registers) {
  Memory memory;
  int base = rm | b << 3;
  bool has_base = true;
  if (rm == 4) {
    const int sib = *p++, index = (sib >> 3 & 7) | x << 3;
    memory.sib = true;
    base = (sib & 7) | b << 3;
    has_base = !((sib & 7) == 5 && mod == 0);
    if (index != 4) memory.index = static_cast<uint64_t>(registers[kRegisters[index]]) << (sib >> 6);
  }
  const bool relative = rm == 5 && mod == 0;
  int64_t displacement = 0;
  if (mod == 1) {
    displacement = static_cast<signed char>(*p++);
  } else if (mod == 2 || relative || !has_base) {
    int32_t d;
    memcpy(&d, p, 4);
    displacement = d;
    p += 4;
  }
  if (relative)
    memory.base = reinterpret_cast<uint64_t>(p);  // of the next instruction: none of these has an immediate
  else if (has_base)
    memory.base = static_cast<uint64_t>(registers[kRegisters[base]]);
  memory.base += static_cast<uint64_t>(displacement);
  return memory;
}

unsigned char* pointer(uint64_t address) { return reinterpret_cast<unsigned char*>(address); }

// Emulates the instruction at `code`; its length, or 0 if it is not AMX's. All are VEX.128.0F38.W0 with three bytes.
int emulate(const unsigned char* code, const greg_t* registers) {
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2) return 0;
  const int opcode = code[3], modrm = code[4], mod = modrm >> 6, reg = modrm >> 3 & 7, rm = modrm & 7;
  if (opcode != 0x49 && opcode != 0x4b && opcode != 0x5c && opcode != 0x5e) return 0;
  current = reinterpret_cast<uint64_t>(code);
  const bool r = !(code[1] & 0x80), x = !(code[1] & 0x40), b = !(code[1] & 0x20);
  const bool wide = code[2] & 0x80, length = code[2] & 4;
  const int vvvv = ~code[2] >> 3 & 15, prefix = code[2] & 3;  // 0: none, 1: 66, 2: F3, 3: F2
  if (wide || length) fault("opcode %#x with VEX.W or VEX.L", opcode);
  if (r) fault("opcode %#x: there is no tmm%d", opcode, reg + 8);
  const unsigned char* p = code + 5;
  if (opcode == 0x5c || opcode == 0x5e) {
    if (opcode != 0x5c || prefix != 2 || mod != 3)
      fault("opcode %#x, prefix %d: a product that is not emulated", opcode, prefix);
    tdpbf16ps(reg, rm | b << 3, vvvv);
    ++counts[kTdpbf16ps];
    return 5;
  }
  if (vvvv) fault("opcode %#x with VEX.vvvv", opcode);
  if (opcode == 0x49 && mod == 3) {
    if (prefix == 0 && modrm == 0xc0) {
      memset(&state.tile, 0, sizeof state.tile);
      memset(state.configuration, 0, sizeof state.configuration);
      set_configured(false);
      ++counts[kTilerelease];
    } else if (prefix == 3 && rm == 0) {
      Tile& zero = tile("tilezero", reg);
      memset(zero.data, 0, sizeof zero.data);
      ++counts[kTilezero];
    } else {
      fault("opcode %#x, ModRM %#x, prefix %d: unknown", opcode, modrm, prefix);
    }
    return 5;
  }
  const Memory memory = decode_memory(p, mod, rm, x, b, registers);
  if (opcode == 0x49) {
    if (reg != 0 || prefix > 1) fault("opcode %#x, ModRM %#x, prefix %d: unknown", opcode, modrm, prefix);
    if (prefix == 0)
      ldtilecfg(pointer(memory.base + memory.index));
    else
      memcpy(pointer(memory.base + memory.index), state.configuration, sizeof state.configuration);
    ++counts[prefix == 0 ? kLdtilecfg : kSttilecfg];
  } else {
    if (!memory.sib) fault("opcode %#x: its address has no SIB", opcode);
    if (prefix == 0 || mod == 3) fault("opcode %#x, ModRM %#x, prefix %d: unknown", opcode, modrm, prefix);
    if (prefix == 2)
      tilestored(reg, pointer(memory.base), static_cast<int64_t>(memory.index));
    else  // tileloadd, tileloaddt1
      tileloadd(reg, pointer(memory.base), static_cast<int64_t>(memory.index));
    ++counts[prefix == 2 ? kTilestored : kTileloadd];
  }
  return static_cast<int>(p - code);
}

void handle(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  bool any = false;
  // Those that follow at once need no signal of their own.
  while (const int length = emulate(pointer(static_cast<uint64_t>(registers[REG_RIP])), registers)) {
    registers[REG_RIP] += length;
    any = true;
  }
  if (!any) sigaction(SIGILL, &previous, nullptr);  // and meet it again
}

}  // namespace

// Also as soon as the library that this is linked into is loaded.
EXPORT __attribute__((constructor)) void amx_emulate() {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  if (sigaction(SIGILL, &action, &previous) != 0) _exit(kFault + 1);
}

// ldtilecfg, sttilecfg, tilerelease, tilezero, tileloadd, tilestored, tdpbf16ps.
EXPORT long amx_count(int kind) { return counts[kind]; }

// Threads whose tiles are configured now.
EXPORT long amx_configured_threads() { return configured_threads; }
