#!/bin/sh
# Builds the pretend libcuda, libcublasLt, libnccl and libnvrtc: build.sh FOLDER
set -eu
sources=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
compiler=${EMULATOR_CXX:-g++}
flags="-std=c++17 -O2 -g1 -march=x86-64-v3 -fPIC -fvisibility=hidden -fno-strict-aliasing -Wall -Wextra"
objects=$(mktemp -d "$folder/objects.XXXXXX")
trap 'rm -rf "$objects"' EXIT

for name in scheduler faults fiber tensor_core checks counters traffic plan devices streams memory copies modules blas_lt nccl nvrtc; do
    echo "$name"
done | xargs -P "$(nproc)" -I NAME "$compiler" $flags "-DEMULATOR_SOURCES=\"$sources\"" -c "$sources/NAME.cpp" -o "$objects/NAME.o"

link() { # link NAME MAJOR OBJECTS AND FLAGS
    name=$1 major=$2
    shift 2
    "$compiler" -shared -Wl,-soname,"$name" -Wl,-z,defs -Wl,-rpath,'$ORIGIN' "$@" -o "$objects/$name"
    mv "$objects/$name" "$folder/$name"
    ln -sf "$name" "$folder/$name.$major"
}
cd "$objects"
link libcuda.so 1 scheduler.o faults.o fiber.o tensor_core.o checks.o counters.o traffic.o plan.o devices.o streams.o memory.o copies.o modules.o -ldl -lpthread
link libcublasLt.so 12 blas_lt.o "-L$folder" -lcuda
link libnccl.so 2 nccl.o "-L$folder" -lcuda -lpthread
link libnvrtc.so 12 nvrtc.o -ldl
