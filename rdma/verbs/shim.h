// What Go calls. Handles are addresses as integers; functions return 0 or an errno.
#include <stddef.h>
#include <stdint.h>

struct pf_wr {
	uint64_t id, addr, remote;
	uint32_t len, lkey, rkey;
	uint16_t op, flags;
};

struct pf_wc {
	uint64_t id;
	uint32_t status, op, len, vendor;
};

struct pf_limits {
	uint8_t gid[16];
	uint64_t guid;
	uint32_t max_qp_wr, max_cqe, rd_atomic, init_rd_atomic;
	uint32_t state, active_mtu, max_msg, max_mr;
};

struct pf_peer {
	uint8_t gid[16];
	uint32_t qpn, psn, my_psn, mtu;
	uint32_t port, gid_index;
	uint32_t rd_atomic, dest_rd_atomic;
	uint32_t timeout, retries;
};

int pf_load(char *why, size_t n);
int pf_open(const char *name, uintptr_t *ctx, uintptr_t *pd, int *async_fd);
int pf_close(uintptr_t ctx, uintptr_t pd);
void pf_kernel(uintptr_t ctx, uintptr_t pd, int *cmd_fd, uint32_t *pd_handle);
int pf_query(uintptr_t ctx, uint32_t port, uint32_t gid_index, struct pf_limits *l);
int pf_async(uintptr_t ctx, uint32_t *type, uintptr_t *qp);
int pf_reg(uintptr_t pd, uintptr_t addr, size_t n, uint32_t access, uintptr_t *mr, uint32_t *lkey, uint32_t *rkey);
int pf_dereg(uintptr_t mr);
int pf_cq_create(uintptr_t ctx, uint32_t n, uintptr_t *ch, uintptr_t *cq, int *fd);
int pf_cq_destroy(uintptr_t ch, uintptr_t cq);
int pf_cq_arm(uintptr_t cq);
int pf_cq_events(uintptr_t ch, uint32_t *n);
int pf_cq_poll(uintptr_t cq, struct pf_wc *wc, int n, uint32_t ns);
int pf_qp_create(uintptr_t pd, uintptr_t cq, uint32_t sends, uint32_t recvs, uint32_t port, uintptr_t *qp, uint32_t *qpn);
int pf_qp_connect(uintptr_t qp, const struct pf_peer *p);
int pf_qp_destroy(uintptr_t qp);
int pf_post_send(uintptr_t qp, const struct pf_wr *wr, int n, int *posted);
int pf_post_recv(uintptr_t qp, const struct pf_wr *wr, int n, int *posted);
const char *pf_status(uint32_t status);
const char *pf_event(uint32_t type);
