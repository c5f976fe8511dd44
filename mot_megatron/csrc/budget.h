// Packing under budgets; see budget.cpp.

#pragma once

#include <pybind11/pybind11.h>

void register_budget(pybind11::module_& module);
