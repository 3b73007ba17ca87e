// Dynamic time warping: the distance of two series when either may be stretched in time.
//
//     cost[i][j] = |x[i] - y[j]| + min(cost[i-1][j], cost[i][j-1], cost[i-1][j-1])
//
// Each cell needs the one to its left, so NumPy, which works on whole rows, must go cell by cell in Python. This code
// keeps two rows and releases the interpreter lock, so that other threads of the process can run meanwhile.
// Source: H. Sakoe and S. Chiba, "Dynamic programming algorithm optimization for spoken word recognition" (1978).

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

namespace nb = nanobind;

// const, since a kernel's inputs are read-only; nanobind refuses any other dtype, layout or number of axes.
using Rows = nb::ndarray<const double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Series = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Distances = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

static double distance(const double *x, std::size_t n, const double *y, std::size_t m,
                       std::vector<double> &above, std::vector<double> &row) {
    constexpr double never = std::numeric_limits<double>::infinity();
    std::fill(above.begin(), above.end(), never);
    above[0] = 0.0;
    for (std::size_t i = 0; i < n; ++i) {
        double left = never;
        row[0] = never;
        for (std::size_t j = 0; j < m; ++j) {
            left = std::abs(x[i] - y[j]) + std::min({above[j], above[j + 1], left});
            row[j + 1] = left;
        }
        std::swap(above, row);
    }
    return above[m];
}

static void distances(Rows rows, Series reference, Distances out) {
    if (out.shape(0) != rows.shape(0))
        throw nb::value_error("out: wanted one element for each of rows");
    const double *x = rows.data(), *y = reference.data();
    const std::size_t count = rows.shape(0), n = rows.shape(1), m = reference.shape(0);
    double *result = out.data();

    nb::gil_scoped_release unlocked;  // nothing below this line may touch a Python object
    std::vector<double> above(m + 1), row(m + 1);
    for (std::size_t i = 0; i < count; ++i)
        result[i] = distance(x + i * n, n, y, m, above, row);
}

NB_MODULE(_warping, module) {
    module.def("distances", &distances, nb::arg("rows"), nb::arg("reference"), nb::arg("out"),
               "The distance of each row from a reference, written to `out`.");
}
