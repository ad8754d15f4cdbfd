/** From messages to the text that a model was taught to answer; templates are run by @huggingface/jinja. */

import { Template } from "./vendor/jinja.js";
import { EdgePeftError } from "./files.js";

const TOKENS = ["bos", "eos", "unk", "sep", "pad", "cls", "mask"].map((name) => `${name}_token`);
const GENERATION = [/\{%(-?)\s*generation\s*(-?)%\}/g, /\{%(-?)\s*endgeneration\s*(-?)%\}/g]; // marks what is trained on

async function settings(files, name) {
  return files.has(name) ? files.json(name) : {};
}

/** Return the function (messages, options) -> text of a bundle's chat template, or null where it has none. */
export async function chatTemplate(files) {
  const own = await settings(files, "tokenizer_config.json");
  const file = "chat_template.jinja";
  let text = files.has(file) ? new TextDecoder().decode((await files.read([file]))[file]) : own.chat_template;
  if (Array.isArray(text)) text = text.find((row) => row.name === "default")?.template;
  if (!text) return null;
  const found = { ...(await settings(files, "special_tokens_map.json")), ...own };
  const special = TOKENS.filter((name) => found[name] != null).map((name) => [name, found[name].content ?? found[name]]);
  const template = new Template(text.replace(GENERATION[0], "{%$1 if true $2%}").replace(GENERATION[1], "{%$1 endif $2%}"));
  const names = { tools: null, documents: null, add_generation_prompt: true, ...Object.fromEntries(special) };
  return (messages, options = {}) => {
    if (!Array.isArray(messages) || !messages.length || !messages.every((m) => typeof m?.role === "string")) {
      throw new EdgePeftError("messages: expected a list of {role, content}.");
    }
    try {
      return template.render({ messages, ...names, ...options });
    } catch (error) {
      throw new EdgePeftError(`the chat template refuses these messages: ${error.message}`);
    }
  };
}
