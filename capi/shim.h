/* Included by every cgo preamble: bigsmall.h, with the Go exports' view of const. */
#ifndef BS_SHIM_H
#define BS_SHIM_H
#include "../include/bigsmall.h"
#endif
