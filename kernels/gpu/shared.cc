// Memory that both sides see, as Python and other callers ask for it.
#include "program.h"

namespace {
pthread_mutex_t blocks_lock = PTHREAD_MUTEX_INITIALIZER;
Array<Buffer*> blocks;
}  // namespace

const Buffer* shared_block(const void* address, uint64_t* offset) {
  const char* at = static_cast<const char*>(address);
  const Buffer* found = nullptr;
  pthread_mutex_lock(&blocks_lock);
  for (const Buffer* block : blocks)
    if (at >= block->mapped && at < block->mapped + block->size) found = block;
  pthread_mutex_unlock(&blocks_lock);
  *offset = found ? static_cast<uint64_t>(at - found->mapped) : 0;
  return found;
}

extern "C" __attribute__((visibility("default"))) void* edgepeft_vulkan_allocate(uint64_t bytes) {
  Failure reason;
  Device* own = device(&reason);
  if (!own) return nullptr;
  Buffer made;
  pthread_mutex_lock(&own->lock);
  const Failure failure = own->allocate(bytes, Memory::shared, &made);
  pthread_mutex_unlock(&own->lock);
  if (failure) return nullptr;
  Buffer* block = static_cast<Buffer*>(__builtin_malloc(sizeof(Buffer)));
  *block = made;
  pthread_mutex_lock(&blocks_lock);
  blocks.push(block);
  pthread_mutex_unlock(&blocks_lock);
  return block->mapped;
}

extern "C" __attribute__((visibility("default"))) void edgepeft_vulkan_free(void* address) {
  Failure reason;
  Device* own = device(&reason);
  pthread_mutex_lock(&own->lock);
  pthread_mutex_lock(&blocks_lock);
  for (size_t i = 0; i < blocks.count; i++) {
    if (blocks[i]->mapped != address) continue;
    own->release(blocks[i]);
    __builtin_free(blocks[i]);
    blocks[i] = blocks[--blocks.count];
    break;
  }
  pthread_mutex_unlock(&blocks_lock);
  pthread_mutex_unlock(&own->lock);
}
