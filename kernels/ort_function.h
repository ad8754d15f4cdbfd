// A function's job on the threads of ONNX Runtime's session: what the operators of functions share.
#pragma once

#include "functions.h"
#include "ort_node.h"

struct FunctionWork {
  const FunctionRow* row;
  const FunctionJob& job;
};
inline void run_function_task(void* work, size_t task) {
  const FunctionWork& w = *static_cast<const FunctionWork*>(work);
  w.row->ops->run(function_task(w.job, static_cast<int64_t>(task)));
}
// apart: as `parallel` takes it.
inline OrtStatus* run_function(OrtKernelContext* context, Function function, const FunctionJob& job, bool apart = false) {
  FunctionWork work = {select_function(function), job};
  return parallel(context, run_function_task, function_tasks(job), &work, apart);
}
