"""A service: models behind HTTP, for clients that know OpenAI's interface, and any task with its probabilities.

client --HTTP--> app.py            the key, the number of open requests; routes; health, metrics, reload
                 bodies.py         a body within its limits, JSON or multipart -> parameters, each with its type
                 native.py         any task of any model                    one file an endpoint: which parameters
                 chat.py           tasks that write text                    there are, and what the answer looks like
                 transcriptions.py tasks that write down what is said
                 realtime.py       sound as it comes, over a WebSocket
                 embeddings.py     pairs, for the vectors of one side
                 media_answers.py  tasks that write sound or pictures
                 looks.py          the attention of any task, as a picture
                 tasks.py          which task is meant, and what each of its fields takes
                 options.py        parameters -> options of `Model.generate`
                 calls.py          one request: its place among the others, its time, its jobs; it ends them when the client leaves
                 values.py         texts, bytes and numbers -> tokens; never a path          (in a pool of threads)
                    |
                 scheduler.py      one thread a checkpoint: rows of the engine, one token a step for all of them;
                    |              what is answered at once is gathered for some milliseconds and packed
                    v
client <--HTTP-- answers.py        pieces and predictions -> JSON, files, server-sent events

checkpoints.py  the models by name; loads one again while the old one finishes what it has
openapi.py      the description of all this for other programs, made of the endpoints and the models' tasks
page.html       the page: at / a form for each task, made from /v1/tasks; at /docs the endpoints, made from /openapi.json
settings.py     limits; errors.py: what a client is told; metrics.py, logs.py: what the operator sees
"""
