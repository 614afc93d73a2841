// What this machine's CPU has beyond NEON.
#pragma once

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace cg::neon {

#if defined(__linux__)
// HWCAP_ASIMDDP and HWCAP2_I8MM, which headers of older systems lack.
constexpr unsigned long kDot = 1ul << 20, kI8mm = 1ul << 13;
inline bool has_dot() { return (getauxval(AT_HWCAP) & kDot) != 0; }
inline bool has_i8mm() { return (getauxval(AT_HWCAP2) & kI8mm) != 0; }
#elif defined(__APPLE__)
inline bool has(const char* feature) {
  int found = 0;
  size_t size = sizeof(found);
  return sysctlbyname(feature, &found, &size, nullptr, 0) == 0 && found;
}
inline bool has_dot() { return has("hw.optional.arm.FEAT_DotProd"); }
inline bool has_i8mm() { return has("hw.optional.arm.FEAT_I8MM"); }
#else
inline bool has_dot() { return false; }
inline bool has_i8mm() { return false; }
#endif

}  // namespace cg::neon
