/*
 * seqno.c
 *		Numbers of a lane, drawn from its sequence.
 *
 * Called by eventlog, in the selling transaction, for each flush of its buffer;
 * and by the worker, which asks whether there is anything new in a lane.
 *
 * Why not nextval(): it makes our sequence the session's last used one, and an
 * application that reads lastval() after its INSERT would get an event's number
 * instead of its own key.  So this advances the sequence's page itself, by the
 * same rules: CACHE 1, a WAL record ahead for every SM_LOG_VALS numbers and for
 * the first number after a checkpoint.  The sequence stays an ordinary one.
 *
 * Locking: RowExclusiveLock on the sequence, owned by the top transaction, so
 * that rolling back to a savepoint does not release it.  The worker reads from
 * these locks which transactions can still bring a missing number to light
 * (gaps.c); the transaction id is assigned before, so that no number is drawn
 * by a transaction that could still be anonymous.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/relation.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "access/xloginsert.h"
#include "commands/sequence.h"
#include "compat.h"
#include "miscadmin.h"
#include "seqno.h"
#include "storage/bufmgr.h"
#include "storage/lmgr.h"
#include "storage/proc.h"
#include "utils/hsearch.h"
#include "utils/rel.h"
#include "utils/resowner.h"

/* Numbers that one WAL record promises ahead, as in the core's sequence.c. */
#define SM_LOG_VALS		32

/* Sequences that this transaction has locked; forgotten by transaction number. */
typedef struct SeqLock
{
	Oid			relid;			/* hash key */
	LocalTransactionId lxid;
} SeqLock;

static HTAB *seq_locks = NULL;

static void
lock_sequence(Oid relid)
{
	SeqLock    *entry;
	bool		found;
	ResourceOwner owner;

	if (seq_locks == NULL)
	{
		HASHCTL		ctl = {.keysize = sizeof(Oid), .entrysize = sizeof(SeqLock)};

		seq_locks = hash_create("softmobile sequence locks", 16, &ctl, HASH_ELEM | HASH_BLOBS);
	}
	entry = hash_search(seq_locks, &relid, HASH_ENTER, &found);
	if (found && entry->lxid == SM_MY_LXID)
		return;
	entry->lxid = InvalidLocalTransactionId;	/* in case locking fails */

	owner = CurrentResourceOwner;
	CurrentResourceOwner = TopTransactionResourceOwner;
	LockRelationOid(relid, RowExclusiveLock);
	CurrentResourceOwner = owner;
	entry->lxid = SM_MY_LXID;
}

/* Reads and locks a sequence's page, which holds one row. */
static Form_pg_sequence_data
read_sequence(Relation rel, int lockmode, Buffer *buf, HeapTuple tuple)
{
	Page		page;
	ItemId		lp;

	*buf = ReadBuffer(rel, 0);
	LockBuffer(*buf, lockmode);
	page = BufferGetPage(*buf);
	lp = PageGetItemId(page, FirstOffsetNumber);
	if (PageIsNew(page) || !ItemIdIsNormal(lp))
		elog(ERROR, "page of sequence \"%s\" is damaged", RelationGetRelationName(rel));
	tuple->t_data = (HeapTupleHeader) PageGetItem(page, lp);
	tuple->t_len = ItemIdGetLength(lp);
	return (Form_pg_sequence_data) GETSTRUCT(tuple);
}

int64
sm_seqno_take(Oid seqrelid, int n)
{
	Relation	rel;
	Buffer		buf;
	Page		page;
	HeapTupleData tuple;
	Form_pg_sequence_data seq;
	int64		first;
	int64		last;
	int64		promised;
	bool		log_ahead;

	Assert(TransactionIdIsValid(GetTopTransactionIdIfAny()));

	lock_sequence(seqrelid);
	rel = relation_open(seqrelid, NoLock);

	seq = read_sequence(rel, BUFFER_LOCK_EXCLUSIVE, &buf, &tuple);
	page = BufferGetPage(buf);
	first = seq->is_called ? seq->last_value + 1 : seq->last_value;
	last = first + n - 1;
	promised = seq->is_called ? seq->log_cnt - n : -1;
	log_ahead = promised < 0 || PageGetLSN(page) <= GetRedoRecPtr();
	if (log_ahead)
		promised = SM_LOG_VALS;

	START_CRIT_SECTION();
	MarkBufferDirty(buf);
	seq->is_called = true;
	if (log_ahead && RelationNeedsWAL(rel))
	{
		xl_seq_rec	record;
		XLogRecPtr	end;

		/* The record holds the state after all promised numbers. */
		seq->last_value = last + promised;
		seq->log_cnt = 0;
		record.SM_XL_SEQ_LOCATOR = rel->SM_RD_LOCATOR;
		XLogBeginInsert();
		XLogRegisterBuffer(0, buf, REGBUF_WILL_INIT);
		XLogRegisterData((char *) &record, sizeof(record));
		XLogRegisterData((char *) tuple.t_data, tuple.t_len);
		end = XLogInsert(RM_SEQ_ID, XLOG_SEQ_LOG);
		PageSetLSN(page, end);
	}
	seq->last_value = last;
	seq->log_cnt = promised;
	END_CRIT_SECTION();

	UnlockReleaseBuffer(buf);
	relation_close(rel, NoLock);
	return first;
}

int64
sm_seqno_highest(Oid seqrelid)
{
	Relation	rel = relation_open(seqrelid, AccessShareLock);
	Buffer		buf;
	HeapTupleData tuple;
	Form_pg_sequence_data seq = read_sequence(rel, BUFFER_LOCK_SHARE, &buf, &tuple);
	int64		highest = seq->is_called ? seq->last_value : seq->last_value - 1;

	UnlockReleaseBuffer(buf);
	relation_close(rel, AccessShareLock);
	return highest;
}
