#include "attention/forward_launch.cuh"

MF_INSTANTIATE_FORWARD(64)
