// Folds held(i) of every `width` threads in a row by halves, into those of the first `least`; `id` is the thread's own.
#define BY_HALVES(held, width, least, of_two) \
  for (uint s = width / 2u; s >= least; s /= 2u) { \
    barrier(); \
    if (id % width < s) held(id) = of_two(held(id), held(id + s)); \
  } \
  barrier()

#define PLUS(a, b) ((a) + (b))
