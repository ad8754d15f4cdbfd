// What the threads of a workgroup hold, added up or the highest of it, for all of them: by subgroups and one barrier for
// what these leave, or by halves in the workgroup's own memory. THREADS is the includer's.
#include "halves.glsl"

shared float scratch[THREADS];  // with subgroups too: none is asked how small it is before the run
#define SCRATCH(i) scratch[i]

#ifdef SUBGROUPS
#extension GL_KHR_shader_subgroup_arithmetic : require
#define FOLDED(name, of_subgroup, of_two) \
  float name(float v) { \
    const float own = of_subgroup(v); \
    if (gl_NumSubgroups == 1u) return own; \
    barrier(); \
    if (subgroupElect()) scratch[gl_SubgroupID] = own; \
    barrier(); \
    float all = scratch[0]; \
    for (uint i = 1u; i < gl_NumSubgroups; i++) all = of_two(all, scratch[i]); \
    return all; \
  }
#else
#define FOLDED(name, of_subgroup, of_two) \
  float name(float v) { \
    const uint id = gl_LocalInvocationID.x; \
    barrier(); \
    scratch[id] = v; \
    BY_HALVES(SCRATCH, THREADS, 1u, of_two); \
    return scratch[0]; \
  }
#endif

FOLDED(add_up, subgroupAdd, PLUS)
FOLDED(highest, subgroupMax, max)
