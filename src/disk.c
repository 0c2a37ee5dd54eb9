/*
 * disk.c
 *		How much room the file systems have that this database writes to.
 *
 * Called by the checklist, in the user's transaction; takes no lock.  SQL has no
 * way to ask: pg_tablespace_size() tells what is used, not what is left.
 */
#include "postgres.h"

#include <sys/statvfs.h>

#include "access/xlog_internal.h"
#include "common/relpath.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"

PG_FUNCTION_INFO_V1(softmobile_disk_space);

/*
 * softmobile.disk_space(tablespace oid) -> (free_bytes, total_bytes)
 *
 * NULL is the WAL; 0 the database's own tablespace, as in pg_class.  Free is what
 * the server may use, without the blocks that the file system keeps for root.
 */
Datum
softmobile_disk_space(PG_FUNCTION_ARGS)
{
	const char *path = XLOGDIR;
	struct statvfs fs;
	TupleDesc	desc;
	Datum		values[2];
	bool		nulls[2] = {false};

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	if (!PG_ARGISNULL(0))
	{
		Oid			tablespace = PG_GETARG_OID(0);

		path = GetDatabasePath(MyDatabaseId, OidIsValid(tablespace) ? tablespace : MyDatabaseTableSpace);
	}
	/* The server's working directory is its data directory. */
	if (statvfs(path, &fs) != 0)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not get the free space of the file system of \"%s\": %m", path)));

	values[0] = Int64GetDatum((int64) fs.f_bavail * (int64) fs.f_frsize);
	values[1] = Int64GetDatum((int64) fs.f_blocks * (int64) fs.f_frsize);
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(desc, values, nulls)));
}
