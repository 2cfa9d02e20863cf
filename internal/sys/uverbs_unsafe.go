package sys

import "unsafe"

// UverbsDeregister ends the memory region of that handle, which belongs to the
// device descriptor fd. EINVAL and ENOENT: there is no such region.
func UverbsDeregister(fd int, driver, handle uint32) error {
	c := NewUverbsCommand(driver, UverbsDeregMR, uint64(handle), 4, 0, 0)
	_, err := ioctlPtr(fd, RDMA_VERBS_IOCTL, unsafe.Pointer(&c))
	return missing("ioctl commands of RDMA devices", "5.0", err)
}
