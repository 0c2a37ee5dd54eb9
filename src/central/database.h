/*
 * database.h
 *		One connection to the database: for pool.c and health.c.
 */
#ifndef SM_GATEWAY_DATABASE_H
#define SM_GATEWAY_DATABASE_H

#include "gateway.h"

#include <libpq-fe.h>

extern PGconn *database_connect(const Options *options);
extern PGresult *database_run(PGconn *conn, Statement statement, const Parameter *parameters, int seconds);
extern bool database_has_answered(const PGresult *result);
extern bool database_may_try_again(const PGresult *result);
extern Answer database_answer(const PGresult *result);

#endif							/* SM_GATEWAY_DATABASE_H */
