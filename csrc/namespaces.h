// The namespace of `torch.ops` that this library's kernels are in: that of the package
// (AAPT_NAMESPACE, aapt unless given) with _sm90 or _sim behind it.
#pragma once

#ifndef AAPT_NAMESPACE
#define AAPT_NAMESPACE aapt
#endif

#define AAPT_JOIN(a, b) a##b
#define AAPT_KERNELS_OF(name, suffix) AAPT_JOIN(name, suffix)

// AAPT_LIBRARY(m) { m.def(schema); } and AAPT_KERNELS(m) { m.impl("op", TORCH_BOX(&op)); }
#define AAPT_DEFINE(name, m) STABLE_TORCH_LIBRARY(name, m)
#define AAPT_IMPLEMENT(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)
// AAPT_FACTS(m) registers functions that take no tensor.
#ifdef AAPT_SIM
#define AAPT_LIBRARY(m) AAPT_DEFINE(AAPT_KERNELS_OF(AAPT_NAMESPACE, _sim), m)
#define AAPT_KERNELS(m) AAPT_IMPLEMENT(AAPT_KERNELS_OF(AAPT_NAMESPACE, _sim), CPU, m)
#else
#define AAPT_LIBRARY(m) AAPT_DEFINE(AAPT_KERNELS_OF(AAPT_NAMESPACE, _sm90), m)
#define AAPT_KERNELS(m) AAPT_IMPLEMENT(AAPT_KERNELS_OF(AAPT_NAMESPACE, _sm90), CUDA, m)
#define AAPT_FACTS(m) \
  AAPT_IMPLEMENT(AAPT_KERNELS_OF(AAPT_NAMESPACE, _sm90), CompositeExplicitAutograd, m)
#endif
