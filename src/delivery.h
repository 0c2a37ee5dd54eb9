/*
 * delivery.h
 *		The worker's view of what is to be delivered: endpoints, branches, lanes,
 *		batches.  See delivery.c for how they move.
 */
#ifndef SM_DELIVERY_H
#define SM_DELIVERY_H

#include "gaps.h"
#include "http.h"
#include "lanes.h"
#include "outbox.h"
#include "request.h"
#include "utils/hsearch.h"
#include "wire.h"

/* A central server, shared by all branches that have its URL. */
typedef struct SmEndpoint
{
	char	   *url;			/* without slash at its end */

	/* what the last request showed, for those who watch; see link.c */
	bool		known;			/* there has been one since the worker began */
	bool		resumed;		/* the worker before this one knew */
	bool		reachable;
	TimestampTz since;
	TimestampTz next_check;		/* a silent link is looked at then */

	/* what the delivery goes by */
	bool		down;
	TimestampTz down_since;
	TimestampTz next_probe;
	int			probes;			/* since it is down */
	bool		probing;		/* a probe is in flight */
	bool		plain;			/* it does not take compressed bodies */
	int64		accepted;		/* events accepted since the worker began */
} SmEndpoint;

/*
 * A batch stands in its lane's queue until it is settled; the first that is not
 * parked is the next to be sent.  Its body exists only from shortly before it is
 * sent until its answer is there.
 */
typedef struct SmBatch
{
	MemoryContext cxt;			/* this struct and all it points to */
	struct SmLane *lane;		/* NULL: exceptions, which have no lane's order */
	struct SmBranch *branch;
	SmEndpoint *endpoint;		/* that it was last built for */
	SmRanges	members;		/* all numbers that it settles */

	/* what is sent; valid while built */
	bool		built;
	MemoryContext body_cxt;
	SmBody		body;
	SmEvent    *events;			/* without payloads */
	int		   *entity_nos;
	int		   *attempts;		/* exceptions only: rejections of each so far */
	int			n;
	int			size;			/* allocated */
	List	   *asides;			/* of SmAside: settled with it, but not sent */

	bool		needs_flush;	/* some commit of it may not be on disk */
	TimestampTz ready_at;		/* built, and all its commits are on disk, since then; 0: not yet */

	bool		parked;			/* refused alone, stays built; waits for another to be accepted */
	int64		refused_at;		/* endpoint's accepted when it was first refused; -1: never */
	char	   *refusal;		/* error of the refused single event */

	int			attempt_count;
	TimestampTz first_attempt_at;
	TimestampTz last_attempt_at;
	char		key[SM_WIRE_KEY_LEN];
	uint8		trace_id[16];
} SmBatch;

/* An event of a batch that becomes an exception without being sent. */
typedef struct SmAside
{
	int64		seq;
	const char *kind;			/* waiting, or rejected when it cannot be sent at all */
	char	   *error;
	pg_uuid_t	waits_for;
} SmAside;

typedef struct SmLane
{
	int			lane_id;
	int			log_id;			/* other than lane_id: an unregistered lane's events of this branch */
	int			epoch_no;
	char		epoch[37];
	SmPriority	priority;
	Oid			seqrelid;
	struct SmBranch *branch;	/* NULL: lane of unregistered branches */

	/*
	 * Every number up to the cursor is settled, in the queue, or an open gap;
	 * some above it may be in skip: settled or queued by a former worker.
	 */
	int64		cursor;
	SmRanges	skip;
	SmGaps		gaps;
	List	   *queue;			/* of SmBatch */
	bool		folded;			/* outbox_lane.settled holds all of the ledger */
	bool		marked;			/* outbox_lane says failed or queued */
	bool		failed;			/* outbox_lane says failed */
	TimestampTz not_before;		/* no attempt until then */
	bool		more;			/* the last reading ended at a limit */
	bool		stalled;		/* ... or at a gap of which nothing could be told yet */
} SmLane;

/* How it stands with the comparison of numbers with central (probe.c). */
typedef enum SmVerify
{
	SM_VERIFY_DUE,				/* to be asked before anything else is sent */
	SM_VERIFY_ASKED,			/* on its way */
	SM_VERIFY_DONE				/* asked, or not to be had; again at verify_at */
} SmVerify;

/* Events of a request, until its line shows that more are better. */
#define SM_USUAL_EVENTS		1000

/* What full requests of a branch have shown about its line; all zero: nothing yet. */
typedef struct SmLineRates
{
	int			requests;		/* with as many events as max_events */
	double		rate;			/* of the best of them, in events a millisecond */
	double		rate_of_half;	/* of the best with half as many; 0: not known */
	int			ceiling;		/* more events than that brought nothing; 0: not known */
} SmLineRates;

typedef struct SmBranch
{
	char	   *id;
	SmEndpoint *endpoint;		/* NULL: no central_url */
	bool		active;
	bool		receipts;
	List	   *lanes;			/* of SmLane, in the order of service */
	HTAB	   *blocked;		/* entities with an open exception; NULL: none */
	bool		blocked_known;
	bool		exceptions_idle;	/* none is queued */
	TimestampTz next_exception; /* when one is due for its automatic retry; 0: none */

	SmBatch    *in_flight;
	bool		checking;		/* a probe for sync_run() is in flight */
	bool		checked;		/* and was answered */
	int			max_events;		/* of the next batch; adapts to the link */
	SmLineRates line;
	int			max_exceptions; /* of the next batch of exceptions; 0: as many as of others */
	int			failures;		/* requests in a row that failed the branch */
	TimestampTz not_before;		/* no attempt until then */
	TimestampTz requeue_at;		/* failed batches are requeued then; 0: none failed */
	bool		held;			/* waits for the retry interval or a new token */
	bool		force;			/* try now, though the link is down */

	SmVerify	verify;
	TimestampTz verify_at;
	int64		void_upto;		/* ledger row up to which central knows void numbers */
	SmVerification found;		/* at the last comparison */

	/* what softmobile.link_state says */
	const char *link_word;		/* NULL: nothing yet */
	TimestampTz link_since;
	SmEndpoint *link_endpoint;

	/* session */
	int64		session;		/* 0: none */
	bool		manual;
	TimestampTz session_started;
	char	   *session_reason; /* X-Reason of its requests */
	char	   *session_error;
	List	   *tickets;		/* of SmRequestTicket: who waits for the manual session */
} SmBranch;

/* What sm_batch_add() did. */
typedef enum SmBatchAdded
{
	SM_BATCH_ADDED,						/* the batch settles it */
	SM_BATCH_ELSEWHERE,			/* another one does */
	SM_BATCH_FULL					/* not added */
} SmBatchAdded;

/* The worker's memory that lives as long as it does. */
extern MemoryContext sm_delivery_cxt;
extern List *sm_delivery_branches;	/* of SmBranch */
extern List *sm_delivery_unregistered;	/* of SmLane */

/* delivery.c */
extern void sm_delivery_init(Oid extension);
extern void sm_delivery_begin(void);
extern void sm_delivery_check_identity(void);
extern void sm_delivery_token_changed(void);
extern bool sm_delivery_on_disk(TransactionId xid);
extern bool sm_delivery_pass(void);
extern long sm_delivery_timeout_ms(void);

/* probe.c */
pg_nodiscard extern bool sm_probe_branch(SmBranch *branch);
extern void sm_probe_send_due(TimestampTz now);
extern bool sm_probe_handle(const SmHttpResult *result);
extern void sm_probe_verify_again(SmEndpoint *endpoint);
extern void sm_probe_verify_soon(SmBranch *branch);

/* session.c: within a transaction; sm_session_commit() ends it */
extern void sm_session_open(SmBranch *branch, bool manual, const char *user, const char *reason);
extern void sm_session_end(SmBranch *branch, const char *error);
extern void sm_session_finish(SmRequestTicket *ticket, int64 session, const char *error);
extern void sm_session_commit(void);

/* link.c: within a transaction */
extern void sm_link_publish(void);

/* requeue.c: within a transaction */
extern void sm_requeue_link_back(SmEndpoint *endpoint);
extern void sm_requeue_due(TimestampTz now);
extern void sm_requeue_apply_requests(void);
extern void sm_requeue_take_run(const SmRequestTicket *taken);

/* registry.c: reading branches and lanes, within sm_outbox_begin() and its commit */
extern void sm_registry_reload(void);
extern TimestampTz sm_registry_again_at(void);
extern SmBranch *sm_registry_find(const char *id);

/* reading.c: what is next in a lane, within a transaction */
extern SmBatch *sm_reading_next(SmLane *lane);
extern void sm_reading_discover(SmLane *lane, List **branches);

/* batch.c: putting batches together, within sm_outbox_begin() and its commit */
extern SmBatch *sm_batch_create(SmLane *lane, SmBranch *branch);
extern void sm_batch_enqueue(SmLane *lane, SmBatch *batch);
extern void sm_batch_begin(SmBatch *batch);
pg_nodiscard extern SmBatchAdded sm_batch_add(SmBatch *batch, const SmEvent *event, int entity_no);
extern void sm_batch_end(SmBatch *batch);
extern SmBatch *sm_batch_exceptions(SmBranch *branch);
extern bool sm_batch_build(SmBatch *batch);
extern void sm_batch_unbuild(SmBatch *batch);
extern void sm_batch_unbuild_others(SmBranch *branch, SmBatch *batch);
extern void sm_batch_free(SmBatch *batch);
extern void sm_batch_split(SmBatch *batch);
extern void sm_batch_to_front(SmBatch *batch);
extern SmBatch *sm_batch_restore(SmLane *lane, const SmRanges *members);
extern void sm_batch_block(SmBranch *branch, int entity_no, const char *entity_id, const pg_uuid_t *id);
extern const SmBlockedEntity *sm_batch_blocked(SmBranch *branch, int entity_no, const char *entity_id);
extern void sm_batch_forget_blocked(SmBranch *branch);
extern void sm_batch_settle_asides(SmBatch *batch);
extern int64 sm_batch_memory(void);

/* endpoint.c */
extern SmEndpoint *sm_endpoint_find(const char *url);
extern void sm_endpoint_resume(SmEndpoint *endpoint, bool reachable, TimestampTz since);
extern void sm_endpoint_note(SmEndpoint *endpoint, bool reachable);
extern void sm_endpoint_failed(SmEndpoint *endpoint);
extern bool sm_endpoint_answered(SmEndpoint *endpoint);
extern bool sm_endpoint_probe_due(SmEndpoint *endpoint, TimestampTz now);
extern void sm_endpoint_set_back(TimestampTz now, int64 us);
extern TimestampTz sm_endpoint_backoff(int failures, int first_ms, int cap_ms);
extern const char *sm_endpoint_token(const char *path, char **token);
extern bool sm_endpoint_token_changed(void);

#endif							/* SM_DELIVERY_H */
