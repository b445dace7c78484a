"""An HTTP service for models: any task with its probabilities, and OpenAI's endpoints.

client --HTTP--> app.py            routes, API keys, limits on open requests; health, metrics, reload
                 bodies.py         body, JSON or multipart -> parameters with types, within limits
                 native.py         any task of any model                  one file for each endpoint: its parameters,
                 chat.py           tasks that write text                  and the format of its answer
                 transcriptions.py tasks that transcribe a sound file
                 realtime.py       live transcription over a WebSocket
                 embeddings.py     embedding vectors of one side of a pair
                 media_answers.py  tasks that generate a sound or a picture
                 looks.py          the attention of any task, as a picture
                 tasks.py          chooses the task; describes what its fields take
                 options.py        parameters -> options of `Model.generate`
                 calls.py          one request: its slot, its timeout, its jobs; cancels them if the client disconnects
                 values.py         texts, bytes and numbers -> tokens, in a pool of threads; never opens a named file
                    |
                 scheduler.py      one thread for each checkpoint: decodes all rows of the batch, one token a step;
                    |              gathers samples that need only one pass for some milliseconds, and packs them
                    v
client <--HTTP-- answers.py        pieces and predictions -> JSON, files, server-sent events

checkpoints.py  the models by name; reloads a model while the old one finishes its requests
openapi.py      the OpenAPI description of the endpoints and the models' tasks
page.html       the web page: at / a form for each task, from /v1/tasks; at /docs the endpoints, from /openapi.json
settings.py     limits; errors.py: errors for clients; metrics.py, logs.py: for the operator
"""
