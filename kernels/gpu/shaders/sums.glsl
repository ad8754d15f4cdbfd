// What the threads of a workgroup hold, added up or the highest of it, for all of them: by subgroups and one barrier for
// what these leave, or by halves in the workgroup's own memory. THREADS is the includer's.
#ifdef SUBGROUPS
#extension GL_KHR_shader_subgroup_arithmetic : require
shared float scratch[THREADS];  // no subgroup is asked how small it is before the run

float add_up(float v) {
  const float own = subgroupAdd(v);
  if (gl_NumSubgroups == 1u) return own;
  barrier();
  if (subgroupElect()) scratch[gl_SubgroupID] = own;
  barrier();
  float sum = scratch[0];
  for (uint i = 1u; i < gl_NumSubgroups; i++) sum += scratch[i];
  return sum;
}

float highest(float v) {
  const float own = subgroupMax(v);
  if (gl_NumSubgroups == 1u) return own;
  barrier();
  if (subgroupElect()) scratch[gl_SubgroupID] = own;
  barrier();
  float top = scratch[0];
  for (uint i = 1u; i < gl_NumSubgroups; i++) top = max(top, scratch[i]);
  return top;
}
#else
shared float scratch[THREADS];

float add_up(float v) {
  const uint id = gl_LocalInvocationID.x;
  barrier();
  scratch[id] = v;
  for (uint s = THREADS / 2u; s > 0u; s /= 2u) {
    barrier();
    if (id < s) scratch[id] += scratch[id + s];
  }
  barrier();
  return scratch[0];
}

float highest(float v) {
  const uint id = gl_LocalInvocationID.x;
  barrier();
  scratch[id] = v;
  for (uint s = THREADS / 2u; s > 0u; s /= 2u) {
    barrier();
    if (id < s) scratch[id] = max(scratch[id], scratch[id + s]);
  }
  barrier();
  return scratch[0];
}
#endif
