/*
 * outbox.h
 *		The worker's SQL: see outbox.c.
 */
#ifndef SM_OUTBOX_H
#define SM_OUTBOX_H

#include "gaps.h"
#include "lanes.h"
#include "ranges.h"
#include "wire.h"

/* A row of outbox_lane, with everything that its delivery state tells. */
typedef struct SmLaneRow
{
	int			lane_id;
	int			log_id;
	int			epoch_no;
	char	   *epoch;			/* uuid */
	char	   *branch;			/* NULL: lane of unregistered branches */
	SmPriority	priority;
	Oid			seqrelid;		/* invalid: a lane that came with a dump */
	SmRanges	settled;		/* with the ledger's tail */
	bool		folded;			/* outbox_lane.settled holds the tail */
	SmRanges	batch;			/* of the failed or requeued batch; empty: none */
	bool		failed;
	int			attempt_count;
	TimestampTz first_attempt_at;
	TimestampTz last_attempt_at;
	char	   *error_message;
} SmLaneRow;

typedef struct SmBranchRow
{
	char	   *branch;
	char	   *central_url;	/* NULL: the setting */
	bool		active;
	bool		receipts;		/* a receipt is required */
} SmBranchRow;

/* What the ledger says of a settled batch. */
typedef struct SmSettlement
{
	int			lane_id;
	const SmRanges *members;
	const char *idempotency_key;
	int			events;
	int			attempt_count;
	TimestampTz first_attempt_at;
	TimestampTz last_attempt_at;
	int			accepted;
	int			duplicates;
	int			exceptions;
	int64		session_id;
	bool		fold;			/* bring outbox_lane.settled up to date */
	bool		whole;			/* nothing of a failed batch is left in the lane */
} SmSettlement;

/* Why an event is an exception. */
typedef struct SmExceptionRow
{
	const char *kind;			/* rejected, conflict, waiting */
	const char *error_message;
	const char *central_row;	/* JSON or NULL */
	const pg_uuid_t *waits_for; /* or NULL */
	int			attempt_count;
	TimestampTz last_attempt_at;
	TimestampTz next_attempt_at;	/* 0: not by itself */
} SmExceptionRow;

/* An exception that is to be sent. */
typedef struct SmExceptionEvent
{
	SmEvent		event;
	int			lane_id;
	int			attempt_count;
	int			entity_no;
} SmExceptionEvent;

/* An entity that has an open exception. */
typedef struct SmBlockedEntity
{
	int			entity_no;
	char	   *entity_id;
	pg_uuid_t	exception;
} SmBlockedEntity;

/* What is published of a branch's link. */
typedef struct SmLinkRow
{
	char	   *branch;
	char	   *url;			/* NULL: none */
	char	   *state;
	TimestampTz since;
} SmLinkRow;

/* What a user has left in outbox_request. */
typedef struct SmRequestRow
{
	char	   *kind;			/* requeue, retry, resend, resolve */
	char	   *branch;			/* NULL: all */
	int64		min_age_us;
	Datum		ids;			/* uuid[], for retry and resolve */
	int			lane_id;		/* for resend */
	SmRanges	seqs;
	char	   *resolution;		/* for resolve: local, central */
	pg_uuid_t  *adoption;		/* for resolve, with central; else NULL */
} SmRequestRow;

/* What a comparison of numbers with central found. */
typedef struct SmVerification
{
	int64		missing;		/* central acknowledged them and does not have them */
	int64		unknown;		/* central has them and this database does not */
	int64		forks;			/* came with two events */
	char	   *why;			/* a new epoch is needed; NULL: it is not */
} SmVerification;

/*
 * Rows of the log, one call each; false ends the reading.  The event's memory is
 * valid during the call only.
 */
typedef bool (*SmOutboxRow) (const SmEvent *event, int entity_no, void *arg);

extern void sm_outbox_init(void);

/* A transaction with one snapshot for all that is read in it. */
extern bool sm_outbox_begin(Oid extension);
extern void sm_outbox_commit(void);
extern void sm_outbox_commit_durably(void);

/* Branches and lanes; true once after they have changed. */
extern bool sm_outbox_lanes_changed(void);
extern void sm_outbox_lanes_stale(void);
extern List *sm_outbox_branches(void);
extern List *sm_outbox_lanes(void);
extern bool sm_outbox_restore_runs(void);
extern List *sm_outbox_register(List *branches);

/* The log */
extern void sm_outbox_read_after(int log_id, int64 after, SmOutboxRow row, void *arg);
extern void sm_outbox_read_members(int log_id, const SmRanges *members, SmOutboxRow row, void *arg);
extern void sm_outbox_visible(int log_id, const char *branch, const SmRanges *gaps, SmRanges *visible);

/* Delivery state */
extern void sm_outbox_settle(const SmSettlement *settlement);
extern void sm_outbox_void(int lane_id, const SmRanges *voids, bool fold);
extern void sm_outbox_fail(int lane_id, const SmRanges *batch, const char *key, int attempts,
						   TimestampTz first, TimestampTz last, TimestampTz next, const char *error);
extern void sm_outbox_requeue(int lane_id);
extern bool sm_outbox_batch_holds(const char *branch, Datum ids);

/* The multirange in a column of SPI_tuptable, as a set. */
extern SmRanges sm_outbox_row_ranges(uint64 row, int col);

/* Exceptions: outbox_exception.c */
extern void sm_outbox_add_exception(int lane_id, int log_id, const SmExceptionRow *row, int64 seq,
									const char *branch);
extern List *sm_outbox_blocked(const char *branch);
extern uint64 sm_outbox_queued_exceptions(const char *branch, int limit, SmExceptionEvent **events);
extern void sm_outbox_exception_delivered(const pg_uuid_t *id);
extern void sm_outbox_exception_failed(const pg_uuid_t *id, const SmExceptionRow *row);
extern int64 sm_outbox_requeue_exceptions(const char *branch, int64 min_age_us);
extern TimestampTz sm_outbox_next_exception(const char *branch);
extern int64 sm_outbox_retry_exceptions(Datum ids);
extern void sm_outbox_resolve_conflict(Datum ids, const char *resolution, const pg_uuid_t *adoption);

/* Numbers here and at central: outbox_verify.c */
extern char *sm_outbox_verify_question(const char *branch, int64 void_after, int64 *void_upto);
extern bool sm_outbox_take_verification(const char *branch, const char *answer, SmVerification *found);

/* Sessions, requests, housekeeping: outbox_session.c */
extern int64 sm_outbox_open_session(const char *branch, bool manual, const char *user, const char *reason);
extern void sm_outbox_progress(int64 session, int64 events, int64 differences);
extern void sm_outbox_close_session(int64 session, const char *error);
extern void sm_outbox_abandon_sessions(void);
extern void sm_outbox_audit_requeue(const char *branch, int64 events, const char *why);
extern void sm_outbox_publish_link(const char *branch, const char *url, const char *state, TimestampTz since);
extern List *sm_outbox_links(void);
extern List *sm_outbox_take_requests(void);
extern SmRanges sm_outbox_resend(int lane_id, const SmRanges *seqs);
extern char *sm_outbox_check_identity(void);
extern void sm_outbox_open_epoch(const char *why);
extern bool sm_outbox_snapshot_step(void);
extern void sm_outbox_keep_house(void);
extern bool sm_outbox_shrink_trash(void);

#endif							/* SM_OUTBOX_H */
