// spirv_compiler SOURCE [OPTION...]: compiles one SYCL source with libsycl's run-time compiler.
//
// With SYCL_DUMP_IMAGES=1 in its environment libsycl writes every SPIR-V image (sycl_spir64*.spv) into the
// working directory. Exit status: 0 compiled, 1 the source has errors (they are on stdout), 2 wrong usage.
#include <sycl/sycl.hpp>

#include <CL/cl.h>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

// The images are dumped before the OpenCL CPU device builds them, and that device rejects or even crashes on code
// that is meant for a GPU. So this executable answers for the loader: linked with -rdynamic, its definitions
// come before those of libOpenCL, and nothing is built.
extern "C" cl_int clBuildProgram(cl_program, cl_uint, const cl_device_id*, const char*,
                                 void (*)(cl_program, void*), void*) {
  return CL_SUCCESS;
}
extern "C" cl_int clCompileProgram(cl_program, cl_uint, const cl_device_id*, const char*, cl_uint, const cl_program*,
                                   const char**, void (*)(cl_program, void*), void*) {
  return CL_SUCCESS;
}

namespace syclex = sycl::ext::oneapi::experimental;

int main(int argc, char** argv) {
  std::ifstream file(argc > 1 ? argv[1] : "");
  if (!file) {
    std::cerr << "usage: spirv_compiler SOURCE [OPTION...]\n";
    return 2;
  }
  std::stringstream source;
  source << file.rdbuf();
  const std::vector<std::string> options(argv + 2, argv + argc);
  try {
    sycl::queue queue{sycl::cpu_selector_v};
    auto bundle = syclex::create_kernel_bundle_from_source(queue.get_context(), syclex::source_language::sycl, source.str());
    std::string log;
    syclex::compile(bundle, {queue.get_device()}, syclex::properties{syclex::save_log{&log}, syclex::build_options{options}});
    std::cout << log;
  } catch (const std::exception& error) {
    std::cout << error.what() << "\n";
    return 1;
  }
}
