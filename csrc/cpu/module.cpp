#include <pybind11/pybind11.h>
PYBIND11_MODULE(_cpu, module) { module.attr("__doc__") = "CPU kernels"; }
