// Package bench is the benchmarks behind `make bench`: what a migration costs,
// beside what this machine could do at best, measured in the same run.
//
//	BenchmarkSwitch      freeze to running, as client, program and daemon see it
//	BenchmarkStages      where that time goes
//	BenchmarkFault       a touch of a missing page, as the touching thread sees it
//	BenchmarkThroughput  memory moved per second, beside the ceiling of its stages
//	BenchmarkMemory      what destination and source need besides the process
//	BenchmarkPrecopy     hybrid and pre-copy: idle and busy processes, the order of pages, QEMU
//	BenchmarkTrack       what it costs to know which pages change
//	BenchmarkShown       memory read through the files that show it, beside go-fuse alone and tmpfs
//	BenchmarkLink        how much of a slow link is used, and what compression makes of it
//
// Every figure has its limit or its peer in the same run: the stages' own costs,
// one TCP stream over the same link, the same server untracked, the other order of
// pages. Other programs (QEMU, iperf3) are peers where they are installed, and else
// left out with a word of how to get them; nothing here installs them. Two hosts
// share this machine's memory, so a process is there twice while it moves: the
// largest is 8 GiB, and left out where that does not fit.
//
// What is moved are real programs between two hosts of a lab, by real daemons:
// see [Stage]. Only the single fault is measured on a pager alone ([Rig]), so
// that the background stream can be left out, and tracking on a process that
// stays ([Guest.Track]). Each turn of b.Loop is one
// migration, so that -benchtime 10x gives medians of ten; the limits of the
// machine ([Limits], [RawFault]) are measured in turns with them. A machine is
// never as fast twice: ratios are the result, and the table at the end ([Table])
// says which of them are what they should be.
//
// The package's own parts do not test anything, and fail with errors; the
// benchmarks are in its test files, and TestBenchmarks runs each of them in a
// small form.
//
// Processes: [Main] must be called first in the program, which is run again as
// the hosts' init, as the client, the load, the tracker and the other end of a
// socket. Everything that a Stage started ends with its Close.
//
// Units: bytes, GiB for rates (GiB/s), time.Duration unless a name says else.
package bench
