//go:build cgo

#include "shim.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

// The exported functions by name. Some names are macros with parameters, too,
// which these uses leave alone.
#define EXPORTED(X) \
	X(ibv_get_device_list) X(ibv_free_device_list) X(ibv_get_device_name) X(ibv_open_device) X(ibv_close_device) \
	X(ibv_get_async_event) X(ibv_ack_async_event) X(ibv_query_device) X(ibv_query_port) X(ibv_query_gid) \
	X(ibv_alloc_pd) X(ibv_dealloc_pd) X(ibv_reg_mr) X(ibv_dereg_mr) \
	X(ibv_create_comp_channel) X(ibv_destroy_comp_channel) X(ibv_create_cq) X(ibv_destroy_cq) \
	X(ibv_get_cq_event) X(ibv_ack_cq_events) X(ibv_create_qp) X(ibv_modify_qp) X(ibv_destroy_qp) \
	X(ibv_wc_status_str) X(ibv_event_type_str)

#define FIELD(name) __typeof__(&name) p_##name;
static struct { EXPORTED(FIELD) } v;

int pf_load(char *why, size_t n)
{
	void *h = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL);
	if (!h) {
		snprintf(why, n, "%s", dlerror());
		return ENOENT;
	}
#define RESOLVE(name) \
	v.p_##name = (__typeof__(v.p_##name))dlsym(h, #name); \
	if (!v.p_##name) { \
		snprintf(why, n, "%s", dlerror()); \
		return ENOSYS; \
	}
	EXPORTED(RESOLVE)
	return 0;
}

// err is the errno of a call that has just failed: not all providers set it.
static int err(void)
{
	return errno ? errno : EIO;
}

static int nonblocking(int fd)
{
	int fl = fcntl(fd, F_GETFL);
	return fl < 0 || fcntl(fd, F_SETFL, fl | O_NONBLOCK) ? errno : 0;
}

int pf_open(const char *name, uintptr_t *ctx, uintptr_t *pd, int *async_fd)
{
	struct ibv_device **list = v.p_ibv_get_device_list(NULL);
	struct ibv_context *c = NULL;
	int rc = ENODEV;
	if (!list)
		return err();
	for (int i = 0; list[i]; i++) {
		if (strcmp(v.p_ibv_get_device_name(list[i]), name))
			continue;
		errno = 0;
		c = v.p_ibv_open_device(list[i]);
		rc = c ? 0 : err();
		break;
	}
	v.p_ibv_free_device_list(list);
	if (rc)
		return rc;
	errno = 0;
	struct ibv_pd *p = v.p_ibv_alloc_pd(c);
	rc = p ? nonblocking(c->async_fd) : err();
	if (rc) {
		if (p)
			v.p_ibv_dealloc_pd(p);
		v.p_ibv_close_device(c);
		return rc;
	}
	*ctx = (uintptr_t)c;
	*pd = (uintptr_t)p;
	*async_fd = c->async_fd;
	return 0;
}

int pf_close(uintptr_t ctx, uintptr_t pd)
{
	int rc = v.p_ibv_dealloc_pd((struct ibv_pd *)pd);
	int rc2 = v.p_ibv_close_device((struct ibv_context *)ctx);
	return rc ? rc : rc2 ? err() : 0;
}

// pf_kernel says by which names the kernel knows device and protection domain.
void pf_kernel(uintptr_t ctx, uintptr_t pd, int *cmd_fd, uint32_t *pd_handle)
{
	*cmd_fd = ((struct ibv_context *)ctx)->cmd_fd;
	*pd_handle = ((struct ibv_pd *)pd)->handle;
}

int pf_query(uintptr_t ctx, uint32_t port, uint32_t gid_index, struct pf_limits *l)
{
	struct ibv_device_attr a;
	struct ibv_port_attr p;
	union ibv_gid gid;
	int rc = v.p_ibv_query_device((struct ibv_context *)ctx, &a);
	if (rc)
		return rc;
	// The exported ibv_query_port fills the front part that it has had from the beginning.
	memset(&p, 0, sizeof p);
	if ((rc = v.p_ibv_query_port((struct ibv_context *)ctx, port, (struct _compat_ibv_port_attr *)&p)))
		return rc;
	errno = 0;
	if (v.p_ibv_query_gid((struct ibv_context *)ctx, port, gid_index, &gid))
		return err();
	memset(l, 0, sizeof *l);
	memcpy(l->gid, gid.raw, 16);
	l->guid = a.node_guid;
	l->max_qp_wr = a.max_qp_wr;
	l->max_cqe = a.max_cqe;
	l->rd_atomic = a.max_qp_rd_atom;
	l->init_rd_atomic = a.max_qp_init_rd_atom;
	l->state = p.state;
	l->active_mtu = 128u << p.active_mtu;
	l->max_msg = p.max_msg_sz;
	l->max_mr = a.max_mr;
	return 0;
}

int pf_async(uintptr_t ctx, uint32_t *type, uintptr_t *qp)
{
	struct ibv_async_event e;
	errno = 0;
	if (v.p_ibv_get_async_event((struct ibv_context *)ctx, &e))
		return err();
	*type = e.event_type;
	*qp = 0;
	switch (e.event_type) {
	case IBV_EVENT_QP_FATAL:
	case IBV_EVENT_QP_REQ_ERR:
	case IBV_EVENT_QP_ACCESS_ERR:
	case IBV_EVENT_PATH_MIG_ERR:
		*qp = (uintptr_t)e.element.qp;
		break;
	default:
		break;
	}
	v.p_ibv_ack_async_event(&e);
	return 0;
}

int pf_reg(uintptr_t pd, uintptr_t addr, size_t n, uint32_t access, uintptr_t *mr, uint32_t *lkey, uint32_t *rkey)
{
	errno = 0;
	struct ibv_mr *m = (v.p_ibv_reg_mr)((struct ibv_pd *)pd, (void *)addr, n, access);
	if (!m)
		return err();
	*mr = (uintptr_t)m;
	*lkey = m->lkey;
	*rkey = m->rkey;
	return 0;
}

int pf_dereg(uintptr_t mr)
{
	return v.p_ibv_dereg_mr((struct ibv_mr *)mr);
}

int pf_cq_create(uintptr_t ctx, uint32_t n, uintptr_t *ch, uintptr_t *cq, int *fd)
{
	struct ibv_context *c = (struct ibv_context *)ctx;
	errno = 0;
	struct ibv_comp_channel *l = v.p_ibv_create_comp_channel(c);
	if (!l)
		return err();
	int rc = nonblocking(l->fd);
	struct ibv_cq *q = rc ? NULL : v.p_ibv_create_cq(c, n, NULL, l, 0);
	if (!q) {
		rc = rc ? rc : err();
		v.p_ibv_destroy_comp_channel(l);
		return rc;
	}
	*ch = (uintptr_t)l;
	*cq = (uintptr_t)q;
	*fd = l->fd;
	return 0;
}

int pf_cq_destroy(uintptr_t ch, uintptr_t cq)
{
	int rc = v.p_ibv_destroy_cq((struct ibv_cq *)cq);
	int rc2 = v.p_ibv_destroy_comp_channel((struct ibv_comp_channel *)ch);
	return rc ? rc : rc2;
}

int pf_cq_arm(uintptr_t cq)
{
	return ibv_req_notify_cq((struct ibv_cq *)cq, 0);
}

// pf_cq_events takes all notifications off the channel. EAGAIN means that there was none.
int pf_cq_events(uintptr_t ch, uint32_t *n)
{
	struct ibv_cq *q;
	void *context;
	*n = 0;
	errno = 0;
	while (!v.p_ibv_get_cq_event((struct ibv_comp_channel *)ch, &q, &context)) {
		v.p_ibv_ack_cq_events(q, 1);
		++*n;
		errno = 0;
	}
	return *n ? 0 : err();
}

static int64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

// pf_cq_poll polls until something comes or ns have passed, at least once, and
// returns the number of completions, or a negative number.
int pf_cq_poll(uintptr_t cq, struct pf_wc *wc, int n, uint32_t ns)
{
	struct ibv_wc w[32];
	int done = 0, k, turn = 0;
	int64_t end = ns ? now() + ns : 0;
	while (!(k = ibv_poll_cq((struct ibv_cq *)cq, n < 32 ? n : 32, w)) && ns) {
		if (++turn % 16 == 0 && now() >= end)
			return 0;
	}
	for (;;) {
		if (k < 0)
			return k;
		for (int i = 0; i < k; i++, done++) {
			wc[done].id = w[i].wr_id;
			wc[done].status = w[i].status;
			wc[done].op = w[i].opcode;
			wc[done].len = w[i].byte_len;
			wc[done].vendor = w[i].vendor_err;
		}
		if (k < 32 || done == n)
			return done;
		k = ibv_poll_cq((struct ibv_cq *)cq, n - done < 32 ? n - done : 32, w);
	}
}

int pf_qp_create(uintptr_t pd, uintptr_t cq, uint32_t sends, uint32_t recvs, uint32_t port, uintptr_t *qp, uint32_t *qpn)
{
	struct ibv_qp_init_attr a = {
		.send_cq = (struct ibv_cq *)cq,
		.recv_cq = (struct ibv_cq *)cq,
		.qp_type = IBV_QPT_RC,
		.cap = { .max_send_wr = sends, .max_recv_wr = recvs, .max_send_sge = 1, .max_recv_sge = 1 },
	};
	errno = 0;
	struct ibv_qp *q = v.p_ibv_create_qp((struct ibv_pd *)pd, &a);
	if (!q)
		return err();
	struct ibv_qp_attr m = {
		.qp_state = IBV_QPS_INIT,
		.port_num = port,
		.qp_access_flags = IBV_ACCESS_REMOTE_READ,
	};
	int rc = v.p_ibv_modify_qp(q, &m, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
	if (rc) {
		v.p_ibv_destroy_qp(q);
		return rc;
	}
	*qp = (uintptr_t)q;
	*qpn = q->qp_num;
	return 0;
}

int pf_qp_connect(uintptr_t qp, const struct pf_peer *p)
{
	struct ibv_qp *q = (struct ibv_qp *)qp;
	int mtu = IBV_MTU_256;
	while (mtu < IBV_MTU_4096 && 128u << mtu < p->mtu)
		mtu++;
	struct ibv_qp_attr r = {
		.qp_state = IBV_QPS_RTR,
		.path_mtu = mtu,
		.dest_qp_num = p->qpn,
		.rq_psn = p->psn,
		.max_dest_rd_atomic = p->dest_rd_atomic,
		.min_rnr_timer = 12, // 0.64 ms
		.ah_attr = { .is_global = 1, .port_num = p->port, .grh = { .sgid_index = p->gid_index, .hop_limit = 64 } },
	};
	memcpy(r.ah_attr.grh.dgid.raw, p->gid, 16);
	int rc = v.p_ibv_modify_qp(q, &r, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
					  IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
	if (rc)
		return rc;
	struct ibv_qp_attr s = {
		.qp_state = IBV_QPS_RTS,
		.sq_psn = p->my_psn,
		.timeout = p->timeout,
		.retry_cnt = p->retries,
		.rnr_retry = 7, // for ever: credits leave no room for it to matter
		.max_rd_atomic = p->rd_atomic,
	};
	return v.p_ibv_modify_qp(q, &s, IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
					IBV_QP_MAX_QP_RD_ATOMIC);
}

int pf_qp_destroy(uintptr_t qp)
{
	return v.p_ibv_destroy_qp((struct ibv_qp *)qp);
}

enum { CHAIN = 64 };

int pf_post_send(uintptr_t qp, const struct pf_wr *wr, int n, int *posted)
{
	static const enum ibv_wr_opcode ops[] = { IBV_WR_SEND, IBV_WR_RDMA_READ };
	struct ibv_send_wr w[CHAIN], *bad;
	struct ibv_sge s[CHAIN];
	for (*posted = 0; *posted < n;) {
		int k = n - *posted < CHAIN ? n - *posted : CHAIN;
		memset(w, 0, k * sizeof *w);
		for (int i = 0; i < k; i++) {
			const struct pf_wr *f = &wr[*posted + i];
			s[i] = (struct ibv_sge){ .addr = f->addr, .length = f->len, .lkey = f->lkey };
			w[i].wr_id = f->id;
			w[i].next = i + 1 < k ? &w[i + 1] : NULL;
			w[i].sg_list = &s[i];
			w[i].num_sge = 1;
			w[i].opcode = ops[f->op & 1];
			w[i].send_flags = f->flags & 1 ? IBV_SEND_SIGNALED : 0;
			w[i].wr.rdma.remote_addr = f->remote;
			w[i].wr.rdma.rkey = f->rkey;
		}
		int rc = ibv_post_send((struct ibv_qp *)qp, w, &bad);
		if (rc) {
			*posted += bad - w;
			return rc;
		}
		*posted += k;
	}
	return 0;
}

int pf_post_recv(uintptr_t qp, const struct pf_wr *wr, int n, int *posted)
{
	struct ibv_recv_wr w[CHAIN], *bad;
	struct ibv_sge s[CHAIN];
	for (*posted = 0; *posted < n;) {
		int k = n - *posted < CHAIN ? n - *posted : CHAIN;
		for (int i = 0; i < k; i++) {
			const struct pf_wr *f = &wr[*posted + i];
			s[i] = (struct ibv_sge){ .addr = f->addr, .length = f->len, .lkey = f->lkey };
			w[i] = (struct ibv_recv_wr){ .wr_id = f->id, .next = i + 1 < k ? &w[i + 1] : NULL, .sg_list = &s[i], .num_sge = 1 };
		}
		int rc = ibv_post_recv((struct ibv_qp *)qp, w, &bad);
		if (rc) {
			*posted += bad - w;
			return rc;
		}
		*posted += k;
	}
	return 0;
}

const char *pf_status(uint32_t status)
{
	return v.p_ibv_wc_status_str(status);
}

const char *pf_event(uint32_t type)
{
	return v.p_ibv_event_type_str(type);
}
