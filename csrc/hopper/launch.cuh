#pragma once
// A kernel is a struct with THREADS, SHARED_BYTES, Parameters and the body of one block.

#include <cuda_runtime.h>

#include <stdexcept>

#include "hopper/thread.cuh"

namespace mfkernels::hopper {

using Stream = cudaStream_t;

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

inline int multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

inline void set_device(int device) { check(cudaSetDevice(device)); }

template <class Kernel>
__global__ void __launch_bounds__(Kernel::THREADS, 1)
    entry(const __grid_constant__ typename Kernel::Parameters parameters) {
  Kernel::block(parameters);
}

template <class Kernel>
void launch(int blocks, const typename Kernel::Parameters& parameters, Stream stream) {
  check(cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SHARED_BYTES));
  entry<Kernel><<<blocks, Kernel::THREADS, Kernel::SHARED_BYTES, stream>>>(parameters);
  check(cudaGetLastError());
}

}  // namespace mfkernels::hopper
