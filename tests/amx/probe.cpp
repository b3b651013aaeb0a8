// Sequences of AMX instructions for tests/test_amx.py, which checks the emulator by them: right ones, and planted
// faults. Registers of every kind in the addresses, since a kernel's compiler may choose any.
#include <cstdint>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct alignas(64) Configuration {
  unsigned char bytes[64] = {};
  Configuration(int palette, int tiles, int rows, int row_bytes) {
    bytes[0] = static_cast<unsigned char>(palette);
    for (int t = 0; t < tiles; ++t) set(t, rows, row_bytes);
  }
  void set(int t, int rows, int row_bytes) {
    bytes[16 + 2 * t] = static_cast<unsigned char>(row_bytes);
    bytes[17 + 2 * t] = static_cast<unsigned char>(row_bytes >> 8);
    bytes[48 + t] = static_cast<unsigned char>(rows);
  }
};

void configure(const void* bytes) { asm volatile("ldtilecfg (%0)" : : "r"(bytes) : "memory"); }
void release() { asm volatile("tilerelease"); }

}  // namespace

// c (m x n float32) += a (m x k pairs) * b (k x n pairs), in tiles of exactly that shape, rows at the given pitches.
EXPORT void probe_product(int m, int n, int k, float* c, int64_t c_pitch, const void* a, int64_t a_pitch, const void* b,
                          int64_t b_pitch) {
  Configuration configuration(1, 0, 0, 0);
  configuration.set(3, m, 4 * n);
  configuration.set(7, m, 4 * k);
  configuration.set(0, k, 4 * n);
  configure(configuration.bytes);
  asm volatile("tileloadd (%0,%1,1), %%tmm3" : : "r"(c), "r"(c_pitch) : "memory");
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm7" : : "r"(a), "r"(a_pitch) : "memory");
  asm volatile("tileloadd (%0,%1,1), %%tmm0" : : "r"(b), "r"(b_pitch) : "memory");
  asm volatile("tdpbf16ps %tmm0, %tmm7, %tmm3");
  asm volatile("tilestored %%tmm3, (%0,%1,1)" : : "r"(c), "r"(c_pitch) : "memory");
  release();
}

// The same tile by every form of address: 8 times 16 x 64 bytes from `from`, stored one after the other to `to`.
EXPORT void probe_addresses(const char* from, char* to) {
  const Configuration configuration(1, 8, 16, 64);
  configure(configuration.bytes);
  asm volatile(
      "mov $64, %%rax\n\t"
      "tileloadd (%0,%%rax,1), %%tmm0\n\t"
      "mov %0, %%r12\n\t"
      "mov $32, %%r13\n\t"
      "tileloadd (%%r12,%%r13,2), %%tmm1\n\t"  // bases that need a SIB or a displacement of their own
      "mov %0, %%r13\n\t"
      "mov $16, %%r9\n\t"
      "tileloadd (%%r13,%%r9,4), %%tmm2\n\t"
      "lea -100(%0), %%r11\n\t"
      "mov $8, %%r10\n\t"
      "tileloadd 100(%%r11,%%r10,8), %%tmm3\n\t"
      "lea 100000(%0), %%rdx\n\t"
      "tileloaddt1 -100000(%%rdx,%%rax,1), %%tmm4\n\t"
      "lea 960(%0), %%rcx\n\t"
      "mov $-64, %%r8\n\t"
      "tileloadd (%%rcx,%%r8,1), %%tmm5\n\t"  // from the last row upwards
      "tileloadd 64(%0), %%tmm6\n\t"          // no index: every row the same
      "tilezero %%tmm7\n\t"
      :
      : "r"(from)
      : "memory", "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13");
  asm volatile(
      "mov $64, %%rax\n\t"
      "mov %0, %%rbx\n\t"
      "tilestored %%tmm0, (%%rbx,%%rax,1)\n\t"
      "tilestored %%tmm1, 1024(%%rbx,%%rax,1)\n\t"
      "tilestored %%tmm2, 2048(%%rbx,%%rax,1)\n\t"
      "tilestored %%tmm3, 3072(%%rbx,%%rax,1)\n\t"
      "tilestored %%tmm4, 4096(%%rbx,%%rax,1)\n\t"
      "tilestored %%tmm5, 5120(%%rbx,%%rax,1)\n\t"
      "tilestored %%tmm6, 6144(%%rbx,%%rax,1)\n\t"
      "tilestored %%tmm7, 7168(%%rbx,%%rax,1)\n\t"
      :
      : "r"(to)
      : "memory", "rax", "rbx");
  release();
}

EXPORT void probe_configuration(void* stored) {
  static const Configuration configuration(1, 5, 7, 12);
  asm volatile("ldtilecfg %0" : : "m"(configuration));  // relative to the instruction
  asm volatile("sttilecfg (%0)" : : "r"(stored) : "memory");
  release();
  asm volatile("sttilecfg (%0)" : : "r"(static_cast<char*>(stored) + 64) : "memory");
}

EXPORT void probe_keep_configured() { configure(Configuration(1, 8, 16, 64).bytes); }
EXPORT void probe_release() { release(); }
EXPORT void probe_other_illegal_instruction() { asm volatile("ud2"); }

namespace {

alignas(64) char memory[1024 + 64];

void product() { asm volatile("tdpbf16ps %tmm6, %tmm4, %tmm0"); }
// tdpbf16ps %tmm4, %tmm4, %tmm0, which assemblers refuse.
void square() { asm volatile(".byte 0xc4, 0xe2, 0x5a, 0x5c, 0xc4"); }
void bytes() { asm volatile("tdpbssd %tmm6, %tmm4, %tmm0"); }
void load() { asm volatile("tileloadd (%0,%1,1), %%tmm4" : : "r"(memory), "r"(int64_t{64}) : "memory"); }
void store() { asm volatile("tilestored %%tmm0, (%0,%1,1)" : : "r"(memory), "r"(int64_t{64}) : "memory"); }

void with(const Configuration& c) { configure(c.bytes); }
Configuration changed(int tile, int rows, int row_bytes) {
  Configuration c(1, 8, 16, 64);
  c.set(tile, rows, row_bytes);
  return c;
}
Configuration byte(int at, int value) {
  Configuration c(1, 8, 16, 64);
  c.bytes[at] = static_cast<unsigned char>(value);
  return c;
}

}  // namespace

// Each must end the process. A name that is not here returns.
EXPORT void probe_fault(const char* name) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("product without configuration")) product();
  if (is("load without configuration")) load();
  if (is("zero without configuration")) asm volatile("tilezero %tmm0");
  if (is("palette")) with(byte(0, 2));
  if (is("reserved byte")) with(byte(5, 1));
  if (is("ninth tile")) with(byte(32, 64));
  if (is("rows of the ninth tile")) with(byte(56, 16));
  if (is("start row")) with(byte(1, 3));
  if (is("17 rows")) with(Configuration(1, 8, 17, 64));
  if (is("68 bytes")) with(Configuration(1, 8, 16, 68));
  if (is("rows without bytes")) with(byte(16, 0));
  if (is("C and A differ in rows")) with(changed(4, 8, 64)), product();
  if (is("A and B differ in k")) with(changed(6, 15, 64)), product();
  if (is("C and B differ in columns")) with(changed(0, 16, 60)), product();
  if (is("half a pair")) with(changed(4, 16, 62)), product();
  if (is("same tile twice")) with(Configuration(1, 8, 16, 64)), square();
  if (is("tile left out")) with(Configuration(1, 6, 16, 64)), product();
  if (is("load of a tile left out")) with(Configuration(1, 4, 16, 64)), load();
  if (is("product after release")) with(Configuration(1, 8, 16, 64)), release(), product();
  if (is("store after release")) with(Configuration(1, 8, 16, 64)), release(), store();
  if (is("store after palette 0")) with(Configuration(1, 8, 16, 64)), with(Configuration(0, 0, 0, 0)), store();
  if (is("other product")) with(Configuration(1, 8, 16, 64)), bytes();
}
