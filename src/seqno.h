/*
 * seqno.h
 *		Numbers of a lane, drawn from its sequence.
 */
#ifndef SM_SEQNO_H
#define SM_SEQNO_H

/*
 * The first of n consecutive numbers of a lane's sequence.  The transaction id
 * must have been assigned before; the sequence stays locked (RowExclusiveLock)
 * until the transaction is over, prepared transactions included.
 */
extern int64 sm_seqno_take(Oid seqrelid, int n);

/*
 * The highest number that was ever taken, 0 if none was.  Whatever a snapshot that
 * was taken before shows of the lane has no higher one.
 */
extern int64 sm_seqno_highest(Oid seqrelid);

#endif							/* SM_SEQNO_H */
