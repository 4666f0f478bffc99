"""llama.cpp's own HTTP server in a process: `python llama_cpp.py MODEL.gguf PORT [KEY]`; serves until it is killed."""

import sys
import threading

import xllamacpp

model, port, *keys = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path = model
params.port = int(port)
params.api_keys = keys
params.n_ctx = 2048
params.n_parallel = 4  # each has a quarter of the context
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # more would spin for each other
params.use_jinja = True
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
threading.Event().wait()
