/*
 * segment.c
 *		Emptying a segment of the log, the one way in which events ever leave it.
 *
 * Called by the worker, through softmobile.recycle_segments() in SQL, which
 * decides which segment may go; runs with the rights of the extension's owner.
 * TRUNCATE gives the disk back at once and leaves no dead rows.  Its lock is
 * waited for no longer than lock_timeout, which the worker sets to milliseconds:
 * dashboards that read the log would queue behind it (sales do not: they write
 * to another segment).
 */
#include "postgres.h"

#include "executor/spi.h"
#include "fmgr.h"
#include "segment.h"

PG_FUNCTION_INFO_V1(softmobile_empty_segment);

static bool recycling = false;

bool
sm_segment_recycling(void)
{
	return recycling;
}

/*
 * softmobile.empty_segment(integer) -> void
 *
 * Errors: 55P03 when somebody reads the segment.
 */
Datum
softmobile_empty_segment(PG_FUNCTION_ARGS)
{
	int32		segment = PG_GETARG_INT32(0);
	char		command[64];

	if (segment < 1 || segment > 4)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("there is no segment %d", segment)));
	snprintf(command, sizeof(command), "TRUNCATE ONLY softmobile.outbox_event_%d", segment);

	SPI_connect();
	recycling = true;
	PG_TRY();
	{
		if (SPI_execute(command, false, 0) != SPI_OK_UTILITY)
			elog(ERROR, "could not truncate segment %d", segment);
	}
	PG_FINALLY();
	{
		recycling = false;
	}
	PG_END_TRY();
	SPI_finish();
	PG_RETURN_VOID();
}
