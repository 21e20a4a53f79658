"""Benchmarks of vectormill, as ratios of two things measured in turn on the same machine: `make bench`.

job_vs_engine                     a whole job against the bare encoder
engine_vs_sentence_transformers   the encoder against the library's own `encode`, on docstrings; `…_prose` and
                                  `…_uniform` on running text and on texts of one length
write_back_vs_executemany         a chunk's commit against `executemany`
submit_vs_copy                    a submission against a raw COPY
submit_memory_1m_vs_4m            a submission's peak memory with few rows against many

peers                             encode, Ray Data and Daft beside the encoder: `make bench-peers`
gpu                               the encoder and jobs on a GPU: `make bench-gpu`
roofline                          the rate that a device's matrix products allow an encoder

harness, machine, corpus          rounds and results; temporary homes; texts
"""
