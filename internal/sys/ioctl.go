package sys

// From <asm-generic/ioctl.h>.
const (
	iocNone  = 0
	iocWrite = 1
	iocRead  = 2
)

func ioc(dir, typ, nr, size uintptr) uintptr { return dir<<30 | size<<16 | typ<<8 | nr }

// IO, IOR, IOW and IOWR are the macros of the same names: type, number, and the
// size in bytes of what the argument points to.
func IO(typ, nr uintptr) uintptr         { return ioc(iocNone, typ, nr, 0) }
func IOR(typ, nr, size uintptr) uintptr  { return ioc(iocRead, typ, nr, size) }
func IOW(typ, nr, size uintptr) uintptr  { return ioc(iocWrite, typ, nr, size) }
func IOWR(typ, nr, size uintptr) uintptr { return ioc(iocRead|iocWrite, typ, nr, size) }
