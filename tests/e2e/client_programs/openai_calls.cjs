// What a program that uses npm's openai does, for test_clients.py: argv holds the URL and the greedy answer.
const assert = require("node:assert");
const OpenAI = require("openai");

const [url, expected] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const city = { type: "object", properties: { city: { type: "string", maxLength: 9 } }, required: ["city"] };
city.additionalProperties = false;
const tools = [{ type: "function", function: { name: "get_weather", description: "Weather.", parameters: city } }];

function body(question, more) {
  const messages = [{ role: "user", content: question }];
  return { model: "ropeway-demo", messages, temperature: 0, max_tokens: 60, ...more };
}

function calls(message) {
  return message.tool_calls.map((call) => [call.function.name, JSON.parse(call.function.arguments)]);
}

async function main() {
  const whole = await client.chat.completions.create(body("Who are you?"));
  assert.equal(whole.choices[0].message.content, expected);
  let text = "";
  for await (const chunk of await client.chat.completions.create(body("Who are you?", { stream: true }))) {
    text += chunk.choices[0]?.delta?.content ?? "";
  }
  assert.equal(text, expected);
  const weather = body("What's the weather in Paris?", { tools });
  const asked = [["get_weather", { city: "Paris" }]];
  assert.deepEqual(calls((await client.chat.completions.create(weather)).choices[0].message), asked);
  const streamed = await client.chat.completions.stream(weather).finalChatCompletion();
  assert.deepEqual(calls(streamed.choices[0].message), asked);
  const format = { type: "json_schema", json_schema: { name: "place", schema: city, strict: true } };
  const place = await client.chat.completions.create(body("Paris", { response_format: format }));
  assert.deepEqual(Object.keys(JSON.parse(place.choices[0].message.content)), ["city"]);
  const newer = { model: "ropeway-demo", input: "Who are you?", temperature: 0, max_output_tokens: 30 };
  assert.equal((await client.responses.create(newer)).output_text, expected);
  assert.equal((await client.responses.stream(newer).finalResponse()).output_text, expected);
  const completion = await client.completions.create({ model: "", prompt: "1, 2", temperature: 0, max_tokens: 6 });
  assert.equal(completion.choices[0].text, ", 3, 4");
  const [model] = (await client.models.list()).data;
  assert.equal((await client.models.retrieve(model.id)).id, model.id);
  await assert.rejects(client.chat.completions.create(body("Who are you?", { max_tokens: 0 })), (error) => {
    assert(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "max_tokens");
    return true;
  });
}

main();
