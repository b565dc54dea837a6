// Probabilities of every text and pair of texts that transformers.js computes in node, and which classes it has.
import { readFileSync } from "node:fs";
import * as library from "@huggingface/transformers";

const { root, folders, texts, pairs, names } = JSON.parse(readFileSync(0, "utf8"));
Object.assign(library.env, { allowRemoteModels: false, localModelPath: root, logLevel: library.LogLevel.ERROR });

const found = { lacking: names.filter((name) => !(name in library)), pipelines: {}, pairs: {} };
for (const folder of folders) {
  const classify = await library.pipeline("text-classification", folder); // the file that config.json names
  found.pipelines[folder] = [];
  for (const text of texts) {
    const scores = await classify(text, { top_k: null });
    found.pipelines[folder].push(Object.fromEntries(scores.map(({ label, score }) => [label, score])));
  }
  const [first, second] = [0, 1].map((side) => pairs.map((pair) => pair[side]));
  const inputs = classify.tokenizer(first, { text_pair: second, padding: true });
  found.pairs[folder] = (await classify.model(inputs)).logits.tolist();
}
process.stdout.write(JSON.stringify(found));
