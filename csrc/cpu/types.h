#pragma once
#include <stdint.h>

namespace rac {

// Element types as python names them by number; keep in step with rac_kernels/native.py.
enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

}  // namespace rac
