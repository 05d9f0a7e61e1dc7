// The gradient kernels as functions: `repack` is made of the others.
#pragma once

#include "gradient.h"

namespace dct {

// A flat buffer of gradients.
struct Bucket {
  void* start;
  int64_t numel;
  int64_t dtype;
};

struct Gathered {
  uint8_t* bytes;  // of `payloads` chunks, one after the other
  int64_t payloads;
};

struct Range {
  int64_t offset, numel;
};

// What no segment covers; `dense` (of the dtype of the bucket) is null where it is to be 0.
struct Uncovered {
  const void* dense;
  const Range* ranges;
  int64_t count;
};

// As in select_threshold.py. The other structs: as in structs.py.
struct Region {
  int64_t segment, grad_offset, state_offset, numel, stride, rank, target;
};

enum Method : int64_t { kRank = 0, kMean = 1, kConstant = 2 };

struct Selecting {
  const Region* regions;
  int64_t count;
  int64_t method;
  double constant;        // the threshold of all (kConstant)
  const double* factors;  // [count]: of the mean (kMean)
  int64_t interval;
  int64_t geometric;  // whether refreshes are so spaced at first
  int64_t hold;       // whether thresholds follow what steps keep
};

struct State {
  float* residual;  // null without error feedback
  float* threshold;
  int64_t* counters;
};

// Whether select_threshold would look at the gradient in this step.
bool reads_gradient(const Selecting& selecting, const State& state);

// `grad.start` is not looked at where `reads_gradient` is false.
void select_threshold(const Selecting& selecting, const Bucket& grad, const State& state, int64_t threads);

void unpack_accumulate(const Layout& layout, const Gathered& gathered, const Uncovered& uncovered, const Bucket& out, int64_t divisor,
                       int64_t threads);

void threshold_pack(const Layout& layout, const Bucket& grad, const State& state, uint8_t* payload, int64_t threads);

// The same, where the gradient is the sum of payloads.
void threshold_pack(const Layout& layout, const Gathered& gathered, const State& state, uint8_t* payload, int64_t threads);

}  // namespace dct
