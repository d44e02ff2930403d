// fastft._C: importing it registers the CPU operators; it tells how it was built and what it uses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace {

const std::map<std::string, fastft::Isa> kNames{{"baseline", fastft::Isa::baseline},
                                                {"avx2", fastft::Isa::avx2},
                                                {"avx512", fastft::Isa::avx512},
                                                {"avx512vnni", fastft::Isa::avx512vnni}};

std::string name_of(fastft::Isa isa) {
  for (auto& [name, value] : kNames)
    if (value == isa) return name;
  return "?";
}

// "8.0;9.0+PTX" as a list; nothing as none.
std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> items;
  std::stringstream stream(list);
  for (std::string item; std::getline(stream, item, ';');) items.push_back(item);
  return items;
}

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(FASTFT_X86)
  info["instruction_sets"] = std::vector<std::string>{"baseline", "avx2", "avx512", "avx512vnni"};
#else
  info["instruction_sets"] = std::vector<std::string>{"baseline"};
#endif
  info["instruction_set"] = name_of(fastft::isa());
#if defined(FASTFT_X86)
  info["intel"] = bool(__builtin_cpu_is("intel"));
#else
  info["intel"] = false;
#endif
  info["compiler"] = __VERSION__;
  info["torch_abi"] = FASTFT_TORCH_ABI;
  info["cuda_architectures"] = split(FASTFT_CUDA_ARCHITECTURES);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled operators of fastft, registered with PyTorch's dispatcher on import.";
  m.def("build_info", &build_info, "Instruction sets, CUDA architectures and versions built in.");
  m.def(
      "limit_isa",
      [](const std::string& name) { return name_of(fastft::limit_isa(kNames.at(name))); },
      "Use at most the named instruction set from now on, in this process; returns the one in use.");
}
