#include "self_test.cuh"

#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "self_test_clusters.cuh"
#include "tensors.h"

namespace lora_kernels {

namespace {

namespace py = pybind11;
using namespace self_test;
using simt::launch;
using simt::launch_clusters;

template <class T>
T* data(py::handle object) {
  return elements<T>(array_of(object));
}

template <class To, class From>
void convert_all(const Array& x, const Array& y) {
  launch(4, 64, 0, convert<To, From>, elements<From>(x), elements<To>(y), x.numel());
}

template <class T>
void bind_multiply(py::module_& m, const char* name) {
  m.def(name, [](py::object a, py::object b, py::object d) {
    launch(1, 32, 0, multiply<T>, data<int>(a), data<int>(b), data<float>(d));
  });
}

void bind_clusters(py::module_& m) {
  m.def("ranks", [](unsigned cluster, std::vector<unsigned> grid, py::object y) {
    launch_clusters(cluster, {grid[0], grid[1], grid[2]}, 32, 0, ranks, data<int>(y));
  });
  m.def("cluster_sum", [](unsigned cluster, py::object x, py::object y, bool first, bool last) {
    const Array t = array_of(x);
    const unsigned n = unsigned(t.sizes[1]);
    const auto kernel = !first ? cluster_sum<false, true> : last ? cluster_sum<true, true> : cluster_sum<true, false>;
    launch_clusters(cluster, unsigned(t.sizes[0]), n + 1, 8 * n, kernel, elements<float>(t), data<float>(y), cluster,
                    n);
  });
  m.def("cluster_order", [](unsigned cluster, py::object order, py::object came, int steps) {
    launch_clusters(cluster, cluster, 64, 0, cluster_order, data<int>(order), data<int>(came), steps);
  });
  m.def("read_late", [](py::object y) { launch_clusters(2, 2, 64, 256, read_late, data<float>(y)); });
  m.def("write_shared_of_cluster",
        [](int bytes, int at) { launch_clusters(2, 2, 32, size_t(bytes), write_shared, at); });
  m.def("launch_clusters", [](unsigned cluster, unsigned blocks) { launch_clusters(cluster, blocks, 32, 0, meet, 1); });
  m.def("cluster_faulty", [](const std::string& name, py::object y) {
    static const std::vector<std::string> names = {"block_and_cluster", "two_cluster_barriers", "lanes_and_cluster",
                                                   "rank_outside",      "address_outside",      "ended_block",
                                                   "copy_to_another"};
    const auto found = std::find(names.begin(), names.end(), name);
    if (found == names.end()) throw py::value_error("no fault " + name);
    launch_clusters(2, 2, 64, 256, cluster_faulty, int(found - names.begin()), data<float>(y));
  });
}

}  // namespace

void bind_self_test(py::module_& module) {
  py::module_ m = module.def_submodule("self_test");
  bind_clusters(m);
  m.def("reverse", [](py::object x, py::object y, unsigned threads) {
    launch(unsigned(array_of(x).numel()) / threads, threads, threads * 4, reverse, data<float>(x), data<float>(y));
  });
  m.def("relay", [](py::object x, py::object y, bool barrier) {
    const Array t = array_of(x);
    const unsigned threads = unsigned(t.sizes[1]);
    launch(1, threads, threads * 4, barrier ? relay<true> : relay<false>, elements<float>(t), data<float>(y),
           int(t.sizes[0]));
  });
  m.def("shuffle", [](int kind, unsigned mask, py::object x, py::object y, int argument, int width) {
    launch(1, 32, 0, shuffle, kind, mask, data<int64_t>(x), data<int64_t>(y), argument, width);
  });
  m.def("votes",
        [](unsigned mask, py::object x, py::object y) { launch(1, 32, 0, votes, mask, data<int>(x), data<int>(y)); });
  m.def("halves", [](py::object x, py::object y) { launch(1, 32, 0, halves, data<int>(x), data<int>(y)); });
  m.def("block_votes", [](py::object x, py::object y) {
    launch(1, unsigned(array_of(x).numel()), 0, block_votes, data<int>(x), data<int>(y));
  });
  m.def("atomics",
        [](py::object x, py::object counts, py::object sum, py::object extremes, py::object order, py::object came) {
          const int n = int(array_of(x).numel());
          launch((n + 127) / 128, 128, 0, atomics, data<int>(x), n, data<int>(counts), data<float>(sum),
                 data<int>(extremes), data<int>(order), data<int>(came));
        });
  m.def("locked_sum", [](py::object x, py::object total, py::object lock) {
    launch(1, unsigned(array_of(x).numel()), 0, locked_sum, data<int>(x), data<int>(total), data<int>(lock));
  });
  m.def("staged", [](py::object x, py::object y, int missing, bool wait, bool barrier) {
    const Array t = array_of(x);
    const unsigned threads = unsigned(t.sizes[1]);
    const auto kernel = !wait ? staged<false, true> : barrier ? staged<true, true> : staged<true, false>;
    launch(1, threads, 2 * 16 * threads, kernel, elements<float>(t), data<float>(y), int(t.sizes[0]), missing);
  });
  bind_multiply<bf16>(m, "multiply_bf16");
  bind_multiply<f16>(m, "multiply_f16");
  bind_multiply<float>(m, "multiply_tf32");
  m.def("fragments", [](py::object x, py::object d, bool transposed) {
    launch(1, 32, 512, transposed ? fragments<true> : fragments<false>, data<int16_t>(x), data<int>(d));
  });
  m.def("matmul", [](py::object x, py::object w) {
    const Array a = array_of(x), b = array_of(w);
    const py::object y = empty({a.sizes[0], b.sizes[0]}, Element::f32);
    launch({unsigned(a.sizes[0]) / 16, unsigned(b.sizes[0]) / 8}, 32, 24 * 24 * 2, matmul, elements<bf16>(a),
           elements<bf16>(b), data<float>(y), int(b.sizes[0]), int(a.sizes[1]));
    return y;
  });
  m.def("convert", [](py::object x, py::object y) {
    const Array from = array_of(x), to = array_of(y);
    if (from.type == Element::f16) return convert_all<float, f16>(from, to);
    if (from.type == Element::bf16) return convert_all<float, bf16>(from, to);
    if (to.type == Element::f16) return convert_all<f16, float>(from, to);
    convert_all<bf16, float>(from, to);
  });
  m.def("unwritten", [](py::object y) {
    const unsigned threads = unsigned(array_of(y).numel());
    launch(1, threads, threads * 4, unwritten, data<float>(y));
  });
  m.def("write_shared", [](int bytes, int at) { launch(2, 32, size_t(bytes), write_shared, at); });
  m.def("count", [](py::object y, int n) { launch(unsigned(n + 63) / 64, 64, 0, count, data<float>(y), n); });
  m.def(
      "launch",
      [](std::vector<unsigned> grid, std::vector<unsigned> block, size_t shared) {
        launch({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, meet, 1);
      },
      py::arg("grid"), py::arg("block"), py::arg("shared"));
  m.def("meet", [](unsigned blocks, unsigned threads, int steps) { launch(blocks, threads, 0, meet, steps); });
  m.def("multiply_much", [](py::object y, int steps) {
    launch(unsigned(array_of(y).numel()) / 128, 128, 0, multiply_much, data<float>(y), steps);
  });
  m.def("faulty", [](const std::string& name, py::object y) {
    static const std::vector<std::string> names = {"circle",          "wrong_mask",   "lane_outside",
                                                   "two_collectives", "two_masks",    "collective_and_barrier",
                                                   "two_barriers",    "after_return", "return_from_a_collective",
                                                   "unaligned_copy",  "copy_outside", "unaligned_rows",
                                                   "bad_width"};
    const auto found = std::find(names.begin(), names.end(), name);
    if (found == names.end()) throw py::value_error("no fault " + name);
    launch({2, 1, 1}, 64, 256, faulty, int(found - names.begin()), data<float>(y));
  });
}

}  // namespace lora_kernels
