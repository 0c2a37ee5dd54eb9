/*
 * wire.h
 *		What goes over the wire to central (wire.c) and what comes back
 *		(wire_answer.c).
 */
#ifndef SM_WIRE_H
#define SM_WIRE_H

#include "datatype/timestamp.h"
#include "lib/stringinfo.h"
#include "utils/uuid.h"

/* An event with a longer payload cannot be sent; sm_wire_add() refuses it. */
#define SM_WIRE_MAX_PAYLOAD (256 * 1024 * 1024)

/* Longest detail kept of an answer, in characters. */
#define SM_WIRE_MAX_DETAIL 500

/* One event.  All text is in the server's encoding and zero-terminated. */
typedef struct SmEvent
{
	int64		seq;
	pg_uuid_t	id;
	char		op;				/* 'i', 'u', 'd'; 's': an existing row, sent as an insert with snapshot */
	const char *entity_type;
	const char *entity_id;
	const char *branch_id;
	TimestampTz created_at;
	const char *reason;			/* or NULL */
	const char *actor;
	const char *payload;		/* JSON: the data member, {"new":..,"old":..} */
	int			payload_len;
	const char *resolution;		/* NULL; or how its conflict was decided: "local", "central" */
	TransactionId xid;			/* that wrote it to the log; not sent */
} SmEvent;

/*
 * Compression levels of sm_wire_begin(); 1 to 9 are zlib's own.  On bodies of
 * 1000 events, 3 makes a twelfth of them for 1.6 us an event, 6 a fourteenth for
 * 4.1 us, which is as much as all else that the worker does.
 */
#define SM_WIRE_PLAIN		0
#define SM_WIRE_GZIP		3

/*
 * A request body under construction.  Callers read `out` (after
 * sm_wire_end()), `raw_len` and `nevents`; the rest is wire.c's.
 */
typedef struct SmBody
{
	StringInfoData out;			/* what is sent */
	int64		raw_len;		/* bytes before compression, so far */
	int			nevents;
	char		error[256];		/* why sm_wire_add() returned false */
	struct SmBodyState *state;	/* encoder, private */
} SmBody;

/*
 * Begin, add events, end.  All memory lies in a context of the body's own
 * below CurrentMemoryContext at sm_wire_begin(); sm_wire_free() or resetting
 * the parent releases it.  On a server whose encoding is not UTF8, begin and
 * add need a transaction (conversion functions are looked up in the catalog).
 */
extern void sm_wire_begin(SmBody *body, int level);
pg_nodiscard extern bool sm_wire_add(SmBody *body, const SmEvent *event, const char *lane,
									 const char *epoch, int epoch_no);
extern void sm_wire_end(SmBody *body);
extern void sm_wire_free(SmBody *body);

/*
 * Bytes that the body has by now.  Compressed, zlib holds back some dozens of
 * kilobytes of text until sm_wire_end().
 */
extern int64 sm_wire_size(const SmBody *body);

/* NULL, or the value for Content-Encoding */
extern const char *sm_wire_encoding(const SmBody *body);

/* What central said of one event that it neither took nor had already. */
typedef struct SmEventVerdict
{
	int			event;			/* index into the batch */
	bool		conflict;		/* else rejected */
	char	   *detail;			/* '' when central gave none */
	char	   *current;		/* what central holds, jsonb text (null: deleted); NULL: it did not say */
} SmEventVerdict;

typedef struct SmReceipt
{
	int			accepted;
	int			duplicates;
	int			nverdicts;
	SmEventVerdict  *verdicts;
	char		error[256];		/* '' or "no receipt: ..." */
} SmReceipt;

/*
 * True if the body is a receipt for exactly these events.  Results lie in
 * CurrentMemoryContext.  Never throws for anything the body may contain.  On a
 * server whose encoding is not UTF8 both need a transaction.
 */
pg_nodiscard extern bool sm_wire_receipt(const char *body, size_t len, const SmEvent *events,
										 int n, SmReceipt *out);

/* the reason in an RFC 9457 problem document, cleaned and cut, or NULL if it is none */
extern char *sm_wire_problem(const char *body, size_t len, const char *content_type);

/* W3C Trace Context: same trace for all attempts of a batch, new parent id each call */
#define SM_WIRE_TRACEPARENT_LEN 56
extern void sm_wire_traceparent(char out[SM_WIRE_TRACEPARENT_LEN], const uint8 trace_id[16]);

/*
 * Same members, same content: same key, a UUID version 8 made from SHA-256.
 * In a transaction.
 */
#define SM_WIRE_KEY_LEN 37
extern void sm_wire_idempotency_key(char out[SM_WIRE_KEY_LEN], const char *epoch,
									const char *lane, const SmEvent *events, int n);

#endif							/* SM_WIRE_H */
