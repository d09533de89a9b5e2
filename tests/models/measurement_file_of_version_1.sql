-- A measurement file of version 1, as it was written before its setting was called measurement_file.
PRAGMA application_id = 1280132688;
PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE footprints (
    machine TEXT NOT NULL, files TEXT NOT NULL, options TEXT NOT NULL, split TEXT NOT NULL,
    state TEXT NOT NULL, took TEXT NOT NULL, loads TEXT NOT NULL, checksum INTEGER NOT NULL,
    PRIMARY KEY (machine, files, options, split)
);
INSERT INTO "footprints" VALUES('a-machine','["/models/a.gguf"]','{}','[]','[[1,2]]','[["cpu",7]]','[0.5]',2072502795);
INSERT INTO "footprints" VALUES('a-machine','["/models/a.gguf"]','{"num_ctx":4096,"num_batch":512,"num_gpu":3,"main_gpu":0,"num_parallel":2,"use_mmap":false,"flash_attention":true,"cache_type_k":"f16","cache_type_v":"q8_0"}','[["GPU-1",3]]','[[1,2]]','[["cpu",7],["GPU-1",5]]','[1.5,2.5]',1236349289);
INSERT INTO "footprints" VALUES('a-machine','["/models/b.gguf"]','{}','[]','[[3,4]]','[["cpu",9]]','[]',4285372011);
COMMIT;
