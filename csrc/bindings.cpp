// The Python module megatron_lite.ops._kernels: every function of csrc/include under its C name without `mlite_`, with
// the C arguments in their order. Pointers and streams are integers (0: absent), strides tuples of three.
//
// Types come from the headers, through the one template below; a function that changes there changes here.
#include <omp.h>
#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>

#include "include/attention.h"
#include "include/kernels.h"

namespace py = pybind11;

extern "C" int mlite_cpu_instruction_set();
#ifdef MLITE_CUDA_ARCHITECTURES
// Declared here, so that this file needs no CUDA header; the enum cudaError_t goes as an int.
extern "C" const char* cudaGetErrorString(int code);
#endif

struct Strides {
  int64_t elements[3];
};

namespace pybind11::detail {
template <>
struct type_caster<Strides> {
  PYBIND11_TYPE_CASTER(Strides, const_name("tuple[int, int, int]"));
  bool load(handle from, bool) {
    if (!PyTuple_Check(from.ptr()) || PyTuple_GET_SIZE(from.ptr()) != 3) return false;
    for (int i = 0; i < 3; ++i) {
      value.elements[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(from.ptr(), i));
      if (value.elements[i] == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        return false;
      }
    }
    return true;
  }
};
}  // namespace pybind11::detail

namespace {

// What Python gives for a C parameter, and what C gets of it. The int64_t pointers of attention.h are strides, those of
// kernels.h tensors.
template <typename T, bool strided>
using Given = std::conditional_t<strided && std::is_same_v<T, const int64_t*>, Strides,
                                 std::conditional_t<std::is_pointer_v<T>, uintptr_t, T>>;

template <typename T, typename From>
T to_c(const From& given) {
  if constexpr (std::is_same_v<From, Strides>) return given.elements;
  else if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(given);
  else return given;
}

[[noreturn]] void fail(const char* name, int code) {
  std::string message = std::string(name) + ": error " + std::to_string(code);
#ifdef MLITE_CUDA_ARCHITECTURES
  if (message.rfind("cuda_", 0) == 0) throw std::runtime_error(message + ", " + cudaGetErrorString(code));
#endif
  throw std::runtime_error(message + ": it does not serve this dtype or these sizes");
}

// A result that is an int is an error code; an int64_t is what the caller wants to know.
template <bool strided, typename Result, typename... Parameters>
void bind(py::module_& module, const char* name, Result (*function)(Parameters...)) {
  module.def(name, [name, function](Given<Parameters, strided>... given) {
    Result result;
    {
      py::gil_scoped_release release;
      result = function(to_c<Parameters>(given)...);
    }
    if constexpr (std::is_same_v<Result, int>) {
      if (result != 0) fail(name, result);
    } else {
      return result;
    }
  });
}

}  // namespace

#define MLITE_KERNELS(X) \
  X(workspace_rows)      \
  X(norm_forward)        \
  X(norm_backward)       \
  X(bias_gelu_forward)   \
  X(bias_gelu_backward)  \
  X(swiglu_forward)      \
  X(swiglu_backward)     \
  X(rotary)              \
  X(softmax_forward)     \
  X(softmax_backward)    \
  X(cross_entropy_stats) \
  X(cross_entropy_grad)  \
  X(dropout)
#define MLITE_ATTENTION(X) \
  X(attention_workspace)   \
  X(attention_forward)     \
  X(attention_backward)

PYBIND11_MODULE(_kernels, module) {
  py::options options;
  options.disable_function_signatures();  // of nameless parameters; _kernels.pyi has those of the headers
  module.doc() = "The kernels of csrc; csrc/include says what they take.";
  module.def(
      "cpu_instruction_set",
      [] {
        const char* const names[] = {"baseline", "avx2", "avx512", "avx512bf16"};
        return names[mlite_cpu_instruction_set()];
      },
      "What the CPU kernels use here: avx512bf16, avx512, avx2 or baseline.");
  module.def("cpu_num_threads", &omp_get_max_threads, "Threads of a kernel that the calling thread starts.");
#define MLITE_BIND_CPU(name) bind<false>(module, "cpu_" #name, mlite_cpu_##name);
#define MLITE_BIND_CPU_STRIDED(name) bind<true>(module, "cpu_" #name, mlite_cpu_##name);
  MLITE_KERNELS(MLITE_BIND_CPU)
  MLITE_ATTENTION(MLITE_BIND_CPU_STRIDED)
#ifdef MLITE_CUDA_ARCHITECTURES
#define MLITE_BIND_CUDA(name) bind<false>(module, "cuda_" #name, mlite_cuda_##name);
#define MLITE_BIND_CUDA_STRIDED(name) bind<true>(module, "cuda_" #name, mlite_cuda_##name);
  MLITE_KERNELS(MLITE_BIND_CUDA)
  MLITE_ATTENTION(MLITE_BIND_CUDA_STRIDED)
  module.attr("cuda_compiled") = true;
  module.attr("cuda_architectures") = py::make_tuple(MLITE_CUDA_ARCHITECTURES);
#else
  module.attr("cuda_compiled") = false;
  module.attr("cuda_architectures") = py::tuple();
#endif
}
