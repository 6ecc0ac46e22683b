// aapt_kernels._sim: the simulator's options and reports for Python. Development builds only.
#include <pybind11/pybind11.h>

#include "sim/control.h"

namespace py = pybind11;

namespace aapt::sim {
namespace {

py::object options_object() { return py::cast(&options(), py::return_value_policy::reference); }

// with configured(seed=3, tma=RANDOM): ...
class Configured {
 public:
  explicit Configured(const py::kwargs& changes) : changes_(changes) {}

  py::object enter() {
    before_ = options();
    py::object object = options_object();
    try {
      for (const auto& change : changes_) py::setattr(object, change.first, change.second);
    } catch (...) {
      options() = before_;
      throw;
    }
    return object;
  }
  void exit(const py::args&) { options() = before_; }

 private:
  py::kwargs changes_;
  Options before_;
};

py::dict statistics_of_last_launch() {
  const Statistics& last = statistics();
  return py::dict(py::arg("blocks") = last.blocks, py::arg("switches") = last.switches,
                  py::arg("bulk_loads") = last.bulk_loads,
                  py::arg("bulk_stores") = last.bulk_stores, py::arg("wgmmas") = last.wgmmas,
                  py::arg("accesses") = last.accesses, py::arg("loaded_bytes") = last.loaded_bytes,
                  py::arg("stored_bytes") = last.stored_bytes);
}

py::dict banks_since_last_call() {
  py::dict places;
  for (const auto& [place, count] : bank_counts()) {
    places[py::str(place)] = py::make_tuple(count.instructions, count.least, count.wavefronts);
  }
  return places;
}

}  // namespace
}  // namespace aapt::sim

PYBIND11_MODULE(_sim, m) {
  using namespace aapt::sim;
  m.doc() = "Controls of the simulator that runs the Hopper kernels on the CPU.";
  m.attr("EAGER") = static_cast<int>(EAGER);
  m.attr("RANDOM") = static_cast<int>(RANDOM);
  m.attr("LATE") = static_cast<int>(LATE);
  py::class_<Options>(m, "Options")
      .def_readwrite("seed", &Options::seed)
      .def_readwrite("tma", &Options::tma)
      .def_readwrite("wgmma", &Options::wgmma)
      .def_readwrite("races", &Options::races)
      .def_readwrite("shuffle_blocks", &Options::shuffle_blocks)
      .def_readwrite("multiprocessors", &Options::multiprocessors)
      .def_readwrite("registers", &Options::registers)
      .def_readwrite("banks", &Options::banks)
      .def_readwrite("inside_patterns", &Options::inside_patterns);
  py::class_<Configured>(m, "configured", "Options changed inside a with block.")
      .def(py::init<const py::kwargs&>())
      .def("__enter__", &Configured::enter)
      .def("__exit__", &Configured::exit);
  m.def("options", &options_object);
  m.def("reset_options", [] { options() = Options{}; });
  m.def("statistics", &statistics_of_last_launch);
  m.def("banks", &banks_since_last_call,
        "Shared memory by place: (warp instructions, cycles without conflicts, cycles), in the "
        "launches with banks=True since the last call.");
  m.def("last_report", [] { return std::string(last_report()); });
}
