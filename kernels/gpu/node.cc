// A node as ONNX Runtime tells of it: its attributes, and the step that it becomes.
#include <stdio.h>
#include <string.h>

#include "program.h"

Failure said(OrtStatus* status) {
  if (!status) return nullptr;
  ort::ReleaseStatus(status);
  return fail("ONNX Runtime refused what it was asked");
}

namespace {
const OrtOpAttr* attribute_of(const OrtNode* node, const char* name) {
  const OrtOpAttr* found = nullptr;
  if (OrtStatus* status = ort::Node_GetAttributeByName(node, name, &found)) return ort::ReleaseStatus(status), nullptr;
  return found;
}
template <class T>
bool read(const OrtNode* node, const char* name, int type, T* data, size_t size, size_t* got) {
  const OrtOpAttr* attribute = attribute_of(node, name);
  if (!attribute) return false;
  OrtStatus* status = ort::ReadOpAttr(attribute, type, static_cast<void*>(data), size, got);
  if (status) ort::ReleaseStatus(status);
  return !status;
}
}  // namespace

int64_t Node::whole(const char* attribute, int64_t otherwise) const {
  int64_t value;
  size_t got;
  return read(node, attribute, kOrtAttributeInt, &value, sizeof(value), &got) ? value : otherwise;
}
float Node::number(const char* attribute, float otherwise) const {
  float value;
  size_t got;
  return read(node, attribute, kOrtAttributeFloat, &value, sizeof(value), &got) ? value : otherwise;
}
bool Node::is(const char* attribute, const char* text, bool otherwise) const {
  if (!attribute_of(node, attribute)) return otherwise;
  char value[32];
  size_t got = 0;
  return read(node, attribute, kOrtAttributeString, value, sizeof(value), &got) && got <= sizeof(value) &&
         !strncmp(value, text, strlen(text)) && (got == strlen(text) || value[strlen(text)] == 0);
}

bool Node::is_wholes(const char* attribute, int64_t first, int64_t second) const {
  int64_t value[2];
  size_t got = 0;
  return read(node, attribute, kOrtAttributeInts, value, sizeof(value), &got) && got == sizeof(value) && value[0] == first &&
         value[1] == second;
}

Failure describe(const OrtNode* node, Node* about) {
  about->node = node;
  GPU_TRY(said(ort::Node_GetName(node, &about->name)));
  GPU_TRY(said(ort::Node_GetOperatorType(node, &about->op)));
  GPU_TRY(said(ort::Node_GetDomain(node, &about->domain)));
  GPU_TRY(said(ort::Node_GetNumInputs(node, &about->inputs)));
  return said(ort::Node_GetNumOutputs(node, &about->outputs));
}

Failure set_up(const OrtNode* node, Node* about, Step* step) {
  GPU_TRY(describe(node, about));
  *step = {};
  snprintf(step->name, sizeof(step->name), "%s", about->name);
  step->op = find_operator(about->domain, about->op);
  const char* why = step->op ? nullptr : "it has no shader";
  if (!why && (about->inputs > kMostInputs || about->outputs > kMostOutputs)) why = "it has too many inputs";
  if (!why) why = step->op->setup(*about, step);
  return why ? fail("%s '%s': %s", about->op, about->name, why) : nullptr;
}
